// mremap moves pages in the page table instead of copying them.
#include "store/os/pages.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

namespace torchcache::store {
namespace {

constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, Linux 5.14; older systems refuse it

// For the whole pages of a range.
void advise(void* begin, size_t size, int advice) {
  const uint64_t page = static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
  const uint64_t first = (reinterpret_cast<uint64_t>(begin) + page - 1) / page * page;
  const uint64_t last = (reinterpret_cast<uint64_t>(begin) + size) / page * page;
  if (first < last) ::madvise(reinterpret_cast<void*>(first), last - first, advice);
}

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
  // To the end of its last page: a mapping of which a part is different cannot be moved.
  if (size >= kHugeBytes) ::madvise(data_, size_, MADV_HUGEPAGE);
}

void touch_pages(void* begin, size_t size) { advise(begin, size, kPopulateWrite); }

void use_huge_pages(void* begin, size_t size) { advise(begin, size, MADV_HUGEPAGE); }

}  // namespace torchcache::store
