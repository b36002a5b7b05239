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

constexpr size_t kHugeBytes = 4 << 20;  // from here on huge pages are worth their waste

// Has the system put memory behind a range at once, instead of in one fault after another. What is there stays.
void touch_pages(void* begin, size_t size);
// Has the system use huge pages for what is touched of a range from now on.
void use_huge_pages(void* begin, size_t size);

}  // namespace torchcache::store
