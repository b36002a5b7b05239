// Memory for rows that wait to be written.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "core/mutex.h"

namespace torchcache::store {

// A pool: released memory serves the next rows, up to a limit, since fresh memory costs a page fault every 4 KiB,
// which is more than the copy. Thread-safe; must outlive its buffers.
class RowBuffers {
 public:
  struct Release {
    RowBuffers* owner = nullptr;
    size_t capacity = 0;
    void operator()(uint8_t* data) const { owner->release(data, capacity); }
  };
  using Buffer = std::unique_ptr<uint8_t[], Release>;

  explicit RowBuffers(size_t max_pooled) : max_pooled_(max_pooled) {}
  ~RowBuffers();
  RowBuffers(const RowBuffers&) = delete;
  RowBuffers& operator=(const RowBuffers&) = delete;

  Buffer allocate(size_t size);  // null if there is no memory

  // For a fork: nothing else may be done with it in between.
  void lock() TORCHCACHE_ACQUIRE(mutex_) { mutex_.lock(); }
  void unlock() TORCHCACHE_RELEASE(mutex_) { mutex_.unlock(); }

 private:
  void release(uint8_t* data, size_t capacity);

  const size_t max_pooled_;
  core::Mutex mutex_;
  std::vector<std::pair<uint8_t*, size_t>> pool_ TORCHCACHE_GUARDED_BY(mutex_);  // with their capacity
  size_t pooled_bytes_ TORCHCACHE_GUARDED_BY(mutex_) = 0;
};

}  // namespace torchcache::store
