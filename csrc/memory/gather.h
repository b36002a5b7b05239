// Rows from anywhere on a device into one tensor: what a launch does, and who does it. No torch and no CUDA here: a
// library without CUDA has everything but the launch (cuda.cu).
#pragma once

#include <cstdint>
#include <vector>

#include "core/device_code.h"

namespace torchcache::memory {

constexpr int kCopiers = 32;          // threads that share a part: a warp
constexpr int64_t kPartBytes = 4096;  // so that a few large rows occupy a device as well as many small ones do

struct Gather {
  const uint8_t* const* rows;  // the first byte of each
  uint8_t* out;
  int64_t count;
  int64_t bytes;  // of a row

  TORCHCACHE_HD int64_t parts_of_row() const { return (bytes + kPartBytes - 1) / kPartBytes; }
  TORCHCACHE_HD int64_t parts() const { return count * parts_of_row(); }
};

// What a thread moves at once: all rows and the output must be aligned to its size, and rows be a multiple of it.
struct alignas(16) Sixteen {
  uint64_t first, second;
};

template <class Unit>
TORCHCACHE_DEVICE void copy_part(const Gather& g, int64_t part, int copier) {
  constexpr int kAtOnce = 4;  // loads that are on their way before the first is stored
  const int64_t row = part / g.parts_of_row(), begin = part % g.parts_of_row() * kPartBytes;
  const int64_t size = g.bytes - begin < kPartBytes ? g.bytes - begin : kPartBytes;
  const auto* from = reinterpret_cast<const Unit*>(g.rows[row] + begin);
  auto* to = reinterpret_cast<Unit*>(g.out + row * g.bytes + begin);
  const int units = static_cast<int>(size / static_cast<int64_t>(sizeof(Unit)));
  for (int first = copier; first < units; first += kAtOnce * kCopiers) {
    Unit moved[kAtOnce];
    TORCHCACHE_UNROLL
    for (int i = 0; i < kAtOnce; ++i)
      if (first + i * kCopiers < units) moved[i] = from[first + i * kCopiers];
    TORCHCACHE_UNROLL
    for (int i = 0; i < kAtOnce; ++i)
      if (first + i * kCopiers < units) to[first + i * kCopiers] = moved[i];
  }
}

// f(Unit{}) for the largest unit that fits.
template <class F>
void with_unit(const std::vector<const uint8_t*>& rows, int64_t bytes, const uint8_t* out, const F& f) {
  uint64_t bits = static_cast<uint64_t>(bytes) | reinterpret_cast<uintptr_t>(out);
  for (const uint8_t* row : rows) bits |= reinterpret_cast<uintptr_t>(row);
  if (bits % 16 == 0) return f(Sixteen{});
  if (bits % 8 == 0) return f(uint64_t{});
  if (bits % 4 == 0) return f(uint32_t{});
  if (bits % 2 == 0) return f(uint16_t{});
  f(uint8_t{});
}

// Queues the copies on the stream of the device that is current for the calling thread. std::runtime_error while that
// captures a graph.
using DeviceGather = void (*)(int32_t device, const std::vector<const uint8_t*>& rows, int64_t bytes, uint8_t* out);

// Null in a library without CUDA.
DeviceGather device_gather();

// Called while the library is loaded.
void register_device_gather(DeviceGather gather);

}  // namespace torchcache::memory
