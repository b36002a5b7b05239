// The device code of the gather, compiled for the host: a launch is a loop over its parts and threads.
// tests/native/test_device_gather.py builds and calls this.
#include "memory/gather.h"

#include <cstdint>
#include <cstring>
#include <vector>

namespace torchcache::memory {
namespace {

// Where single bytes are counted as they are moved.
struct Counted {
  const uint8_t* first = nullptr;
  int64_t size = 0;
  int64_t* counts = nullptr;

  void note(const void* at, size_t bytes) const {
    const int64_t offset = static_cast<const uint8_t*>(at) - first;
    if (offset < 0 || offset >= size) return;
    for (size_t i = 0; i < bytes; ++i) ++counts[offset + static_cast<int64_t>(i)];
  }
};
Counted reads, writes;

template <size_t N>
struct alignas(N) Moved {
  uint8_t bytes[N];
  Moved& operator=(const Moved& other) {
    reads.note(&other, N);
    writes.note(this, N);
    memcpy(bytes, other.bytes, N);
    return *this;
  }
};

}  // namespace

extern "C" void gather_rows(const uint8_t* const* rows, int64_t count, int64_t bytes, uint8_t* out) {
  const Gather g{rows, out, count, bytes};
  with_unit(std::vector<const uint8_t*>(rows, rows + count), bytes, out, [&](auto unit) {
    for (int64_t part = g.parts(); part-- > 0;)
      for (int copier = 0; copier < kCopiers; ++copier) copy_part<decltype(unit)>(g, part, copier);
  });
}

// The same, counting how often each byte of a source of `size` bytes is read, and each byte of the output written.
extern "C" void gather_counted(const uint8_t* const* rows, int64_t count, int64_t bytes, uint8_t* out,
                               const uint8_t* source, int64_t size, int64_t* read, int64_t* written) {
  const Gather g{rows, out, count, bytes};
  reads = {source, size, read};
  writes = {out, count * bytes, written};
  with_unit(std::vector<const uint8_t*>(rows, rows + count), bytes, out, [&](auto unit) {
    for (int64_t part = 0; part < g.parts(); ++part)
      for (int copier = 0; copier < kCopiers; ++copier) copy_part<Moved<sizeof(unit)>>(g, part, copier);
  });
}

}  // namespace torchcache::memory
