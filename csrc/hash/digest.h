// H of docs/format.md: the 128-bit digest of some bytes, on the CPU. No torch here: the store uses it too.
#pragma once

#include <cstddef>
#include <cstdint>

namespace torchcache::hash {

// A digest as two numbers in registers. Its stored form is the canonical one: 16 bytes, big-endian, high half first.
struct Digest {
  uint64_t low;
  uint64_t high;
  friend bool operator==(Digest a, Digest b) { return a.low == b.low && a.high == b.high; }
  friend bool operator!=(Digest a, Digest b) { return !(a == b); }
};

// Bytes of one leaf of a row digest.
constexpr size_t kLeafBytes = 4096;

// H: XXH3-128 of the bytes, padded with zeros to 256 if there are fewer. `data` may be null when `size` is 0.
// Thread-safe; uses AVX2 where the processor has it. Reads nothing past the end.
Digest digest(const void* data, size_t size) noexcept;

// The same by the portable code, for tests on processors that would never use it.
Digest digest_portable(const void* data, size_t size) noexcept;

void to_canonical(Digest d, uint8_t out[16]) noexcept;
Digest from_canonical(const uint8_t in[16]) noexcept;

}  // namespace torchcache::hash
