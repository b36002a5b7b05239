// Large arrays of zeros that grow without being copied.
#pragma once

#include <cstddef>
#include <utility>

namespace torchcache::store {

// An anonymous mapping. What was never touched costs nothing. Not thread-safe.
class Pages {
 public:
  Pages() = default;
  ~Pages();
  Pages(Pages&& other) noexcept { *this = std::move(other); }
  Pages& operator=(Pages&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }

  void* data() const { return data_; }
  size_t size() const { return size_; }

  // Keeps what is there, zeros behind it. What data() gave before is no longer valid. std::bad_alloc.
  void grow(size_t size);

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace torchcache::store
