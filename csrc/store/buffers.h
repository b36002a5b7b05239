// Memory for rows that wait to be written.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace torchcache::store {

// What is given back is kept for the next rows, up to a limit: fresh memory costs a page fault every
// 4 KiB, which is more than the copy. Thread-safe; must outlive what it gave.
class RowBuffers {
 public:
  struct GiveBack {
    RowBuffers* owner = nullptr;
    size_t capacity = 0;
    void operator()(uint8_t* data) const { owner->give_back(data, capacity); }
  };
  using Buffer = std::unique_ptr<uint8_t[], GiveBack>;

  explicit RowBuffers(size_t most_kept) : most_kept_(most_kept) {}
  ~RowBuffers();
  RowBuffers(const RowBuffers&) = delete;
  RowBuffers& operator=(const RowBuffers&) = delete;

  Buffer take(size_t size);  // null if there is no memory

  // For a fork: nothing else may be done with it in between.
  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  void give_back(uint8_t* data, size_t capacity);

  const size_t most_kept_;
  std::mutex mutex_;
  std::vector<std::pair<uint8_t*, size_t>> kept_;  // with their capacity
  size_t kept_bytes_ = 0;
};

}  // namespace torchcache::store
