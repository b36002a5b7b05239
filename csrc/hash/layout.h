// Where the bytes of a batch lie: one description for host and device code. No torch here.
#pragma once

#include <cstddef>
#include <cstdint>

#include "hash/xxh3.h"

namespace torchcache::hash {

// A dimension of a row outside of the bytes that lie together.
struct Dim {
  int64_t size, stride;  // stride in bytes
};

// Dimensions of more than one element that a tensor can have: each at least doubles its number of elements, an int64.
constexpr int kMaxDims = 62;

// Rows of equal shape. The bytes of a row are runs of contiguous bytes, enumerated in logical order.
struct Rows {
  const uint8_t* base;
  int64_t count, stride;  // rows, and bytes from one to the next
  int64_t bytes;          // of a row
  int64_t run;            // bytes that lie together
  int outer = 0;          // dimensions around a run; none: the row is one run
  Dim dims[kMaxDims];     // those, from the outermost inwards

  TORCHCACHE_HD const uint8_t* row(int64_t index) const { return base + index * stride; }

  // The byte at a logical position of the row that starts there; the `run - position % run` bytes from it on lie
  // together.
  TORCHCACHE_HD const uint8_t* locate(const uint8_t* start, int64_t position) const {
    // Most rows are below 4 GiB, and a division of 32 bits is several times faster, on a GPU most of all.
    return bytes <= UINT32_MAX ? locate_by<uint32_t>(start, position) : locate_by<uint64_t>(start, position);
  }

  // The largest power of two up to 8 by which all addresses, strides and lengths can be divided: so many bytes, from
  // any multiple of it on, can be read at once.
  TORCHCACHE_HD int unit() const {
    uint64_t all = reinterpret_cast<uintptr_t>(base) | static_cast<uint64_t>(run) | 8;
    if (count > 1) all |= static_cast<uint64_t>(stride);
    for (int d = 0; d < outer; ++d) all |= static_cast<uint64_t>(dims[d].stride);
    return static_cast<int>(all & -all);
  }

 private:
  template <class Number>
  TORCHCACHE_HD const uint8_t* locate_by(const uint8_t* start, int64_t position) const {
    const auto length = static_cast<Number>(run), at = static_cast<Number>(position);
    Number index = at / length;
    const uint8_t* p = start + (at - index * length);
    for (int d = outer; d-- > 0;) {
      const auto size = static_cast<Number>(dims[d].size);
      const Number next = index / size;
      p += static_cast<int64_t>(index - next * size) * dims[d].stride;
      index = next;
    }
    return p;
  }
};

// The rows of a tensor: dimension 0 counts them, or, with `whole`, the tensor is one row. Strides count elements of
// `item` bytes.
template <class Sizes>
Rows rows_of(const void* data, int64_t item, const Sizes& sizes, const Sizes& strides, bool whole) {
  Rows rows;
  const size_t first = whole ? 0 : 1, dims = sizes.size();
  rows.base = static_cast<const uint8_t*>(data);
  rows.count = whole ? 1 : sizes[0];
  rows.stride = whole ? 0 : strides[0] * item;
  rows.run = rows.bytes = item;
  for (size_t d = first; d < dims; ++d) rows.bytes *= sizes[d];
  if (rows.bytes == 0) return rows;
  // From the innermost dimension outwards; what continues the one before is merged into it.
  for (size_t d = dims; d-- > first;) {
    const int64_t size = sizes[d], stride = strides[d] * item;
    if (size == 1) continue;
    Dim& last = rows.dims[rows.outer - (rows.outer > 0)];
    if (rows.outer == 0 && stride == rows.run) {
      rows.run *= size;
    } else if (rows.outer > 0 && stride == last.size * last.stride) {
      last.size *= size;
    } else {
      rows.dims[rows.outer++] = {size, stride};
    }
  }
  for (int i = 0, j = rows.outer - 1; i < j; ++i, --j) {
    const Dim inner = rows.dims[i];
    rows.dims[i] = rows.dims[j], rows.dims[j] = inner;
  }
  return rows;
}

// Rows of `bytes` bytes, one directly after the other.
inline Rows adjacent_rows(const void* data, int64_t count, int64_t bytes) {
  Rows rows;
  rows.base = static_cast<const uint8_t*>(data);
  rows.count = count;
  rows.stride = rows.bytes = rows.run = bytes;
  return rows;
}

}  // namespace torchcache::hash
