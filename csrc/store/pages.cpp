// mremap moves pages in the page table instead of copying them.
#include "store/pages.h"

#include <sys/mman.h>

#include <new>

namespace torchcache::store {
namespace {

constexpr size_t kHugeBytes = 4 << 20;  // from here on huge pages are worth their waste

}  // namespace

Pages::~Pages() {
  if (data_ != nullptr) ::munmap(data_, size_);
}

void Pages::grow(size_t size) {
  if (size <= size_) return;
  void* grown = data_ == nullptr
                    ? ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
                    : ::mremap(data_, size_, size, MREMAP_MAYMOVE);
  if (grown == MAP_FAILED) throw std::bad_alloc();
  data_ = grown;
  size_ = size;
  if (size >= kHugeBytes) ::madvise(data_, size_, MADV_HUGEPAGE);
}

}  // namespace torchcache::store
