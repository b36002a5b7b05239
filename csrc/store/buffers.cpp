// Small buffers are the allocator's; large ones are mappings, and some of them are pooled.
#include "store/buffers.h"

#include <sys/mman.h>

#include <new>

#include "store/format/format.h"

namespace torchcache::store {
namespace {

constexpr size_t kLarge = 64 << 10;
constexpr size_t kUnit = 16 << 10;  // so that batches of about one size can reuse each other's memory

}  // namespace

RowBuffers::~RowBuffers() {
  for (const auto& [data, capacity] : pool_) ::munmap(data, capacity);
}

RowBuffers::Buffer RowBuffers::allocate(size_t size) {
  if (size < kLarge) return Buffer(new (std::nothrow) uint8_t[size], {this, size});
  const size_t capacity = padded(size, kUnit);
  {
    core::MutexLock lock(mutex_);
    for (auto pooled = pool_.rbegin(); pooled != pool_.rend(); ++pooled) {
      if (pooled->second < capacity || pooled->second > capacity + capacity / 4) continue;
      Buffer buffer(pooled->first, {this, pooled->second});
      pooled_bytes_ -= pooled->second;
      pool_.erase(std::next(pooled).base());
      return buffer;
    }
  }
  // All pages at once, which is cheaper than one fault after another.
  void* data = ::mmap(nullptr, capacity, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
  return Buffer(data == MAP_FAILED ? nullptr : static_cast<uint8_t*>(data), {this, capacity});
}

void RowBuffers::release(uint8_t* data, size_t capacity) {
  if (capacity < kLarge) {
    delete[] data;
    return;
  }
  {
    core::MutexLock lock(mutex_);
    if (pooled_bytes_ + capacity <= max_pooled_) {
      pool_.emplace_back(data, capacity);
      pooled_bytes_ += capacity;
      return;
    }
  }
  ::munmap(data, capacity);
}

}  // namespace torchcache::store
