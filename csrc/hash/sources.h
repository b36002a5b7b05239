// Where the lanes of a team get the words of a message from. No CUDA and no torch here, so that all of it can be tested
// on any machine.
#pragma once

#include <cstdint>
#include <cstring>

#include "hash/layout.h"
#include "hash/xxh3.h"

namespace torchcache::hash {

// The number in `bytes` bytes at an address that can be divided by that.
template <int bytes>
TORCHCACHE_DEVICE uint64_t read_unit(const uint8_t* p) {
  uint64_t v = 0;
  memcpy(&v, __builtin_assume_aligned(p, bytes), bytes);
  return v;
}

// A message that lies together, in whole units.
template <int bytes>
struct Together {
  TORCHCACHE_DEVICE static constexpr int unit() { return bytes; }
  const uint8_t* start;

  TORCHCACHE_DEVICE Together(const Rows&, const uint8_t* row, int64_t begin) : start(row + begin) {}
  TORCHCACHE_DEVICE uint64_t part(int64_t position) const { return read_unit<bytes>(start + position); }
  TORCHCACHE_DEVICE uint64_t operator()(int64_t position) const {
    uint64_t word = 0;
    TORCHCACHE_UNROLL
    for (int i = 0; i < 8; i += bytes) word |= part(position + i) << (8 * i);
    return word;
  }
};

TORCHCACHE_APART const uint8_t* located(const Rows& rows, const uint8_t* row, int64_t position) {
  return rows.locate(row, position);
}

// A message of a row that does not.
struct Scattered {
  const Rows& rows;
  const uint8_t* row;
  int64_t begin;
  int bytes;

  TORCHCACHE_DEVICE Scattered(const Rows& all, const uint8_t* start, int64_t at)
      : rows(all), row(start), begin(at), bytes(all.unit()) {}
  TORCHCACHE_DEVICE int unit() const { return bytes; }
  TORCHCACHE_DEVICE uint64_t part(int64_t position) const {
    const uint8_t* p = located(rows, row, begin + position);
    switch (bytes) {
      case 1:
        return read_unit<1>(p);
      case 2:
        return read_unit<2>(p);
      case 4:
        return read_unit<4>(p);
      default:
        return read_unit<8>(p);
    }
  }
  TORCHCACHE_DEVICE uint64_t operator()(int64_t position) const {
    uint64_t word = 0;
    TORCHCACHE_ROLLED
    for (int i = 0; i < 8; i += bytes) word |= part(position + i) << (8 * i);
    return word;
  }
};

// A short message, and zeros behind it. Nothing past its end is read.
template <class Source>
struct Padded {
  const Source& source;
  int64_t size;

  TORCHCACHE_DEVICE uint64_t operator()(int64_t position) const {
    uint64_t word = 0;
    TORCHCACHE_ROLLED
    for (int i = 0; i < 8 && position + i < size; i += source.unit()) word |= source.part(position + i) << (8 * i);
    return word;
  }
};

// Digests that other teams of the same launch have written: not what the first-level cache, which is not
// updated by them, may still hold of their neighbours.
struct Written {
  const uint8_t* start;

  TORCHCACHE_DEVICE static constexpr int unit() { return 8; }
  TORCHCACHE_DEVICE uint64_t part(int64_t position) const {
#if defined(__CUDA_ARCH__)
    return __ldcg(reinterpret_cast<const unsigned long long*>(start + position));
#else
    return read_unit<8>(start + position);
#endif
  }
  TORCHCACHE_DEVICE uint64_t operator()(int64_t position) const { return part(position); }
};

template <class Source>
struct Is {
  using type = Source;
};

// f(Is<the source that reads these rows>).
template <class F>
void with_source(const Rows& rows, const F& f) {
  if (rows.outer > 0) return f(Is<Scattered>());
  switch (rows.unit()) {
    case 1:
      return f(Is<Together<1>>());
    case 2:
      return f(Is<Together<2>>());
    case 4:
      return f(Is<Together<4>>());
    default:
      return f(Is<Together<8>>());
  }
}

}  // namespace torchcache::hash
