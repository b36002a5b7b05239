// Rows are cut in leaves of 4096 bytes, leaves of all rows are shared out among torch's threads.
#include "hash/cpu.h"

#include <algorithm>
#include <cstring>

#include "core/parallel.h"

namespace torchcache::hash {
namespace {

// Measured: below about 1 MB of input a second thread costs more than it brings.
constexpr int64_t kLeavesPerThread = 192;
constexpr int64_t kKeysPerThread = 4096;
constexpr int64_t kLeaf = kLeafBytes;

// Elements of the usual sizes as single moves: runs of one element are what channels_last gives.
void copy(uint8_t* out, const uint8_t* in, int64_t n) {
  switch (n) {
    case 1:
      *out = *in;
      break;
    case 2:
      memcpy(out, in, 2);
      break;
    case 4:
      memcpy(out, in, 4);
      break;
    case 8:
      memcpy(out, in, 8);
      break;
    default:
      memcpy(out, in, n);
  }
}

// `size` bytes of a row that does not lie together, from the logical position `begin` on.
void gather(const Rows& rows, const uint8_t* start, int64_t begin, int64_t size, uint8_t* out) {
  const Dim& inner = rows.dims[rows.outer - 1];
  while (size > 0) {
    int64_t skip = begin % rows.run;
    const uint8_t* p = rows.locate(start, begin - skip);
    for (int64_t i = begin / rows.run % inner.size; i < inner.size && size > 0; ++i, p += inner.stride, skip = 0) {
      const int64_t n = std::min(rows.run - skip, size);
      copy(out, p + skip, n);
      out += n, size -= n, begin += n;
    }
  }
}

Digest leaf(const Rows& rows, int64_t row, int64_t index) {
  const uint8_t* start = rows.row(row);
  const int64_t begin = index * kLeaf;
  const int64_t size = std::min(kLeaf, rows.bytes - begin);
  if (rows.outer == 0) return digest(start + begin, size);
  uint8_t buffer[kLeafBytes];
  gather(rows, start, begin, size, buffer);
  return digest(buffer, size);
}

}  // namespace

std::vector<Digest> row_digests(const Rows& rows) {
  const int64_t leaves = std::max<int64_t>(1, (rows.bytes + kLeaf - 1) / kLeaf), total = rows.count * leaves;
  std::vector<Digest> result(total);
  const int64_t leaf_bytes = std::clamp<int64_t>(rows.bytes, 1, kLeaf);
  core::parallel(total, kLeavesPerThread * kLeaf / leaf_bytes, [&](int64_t begin, int64_t end) {
    int64_t row = begin / leaves, index = begin % leaves;
    for (int64_t i = begin; i < end; ++i) {
      result[i] = leaf(rows, row, index);
      if (++index == leaves) index = 0, ++row;
    }
  });
  if (leaves == 1) return result;
  std::vector<uint8_t> canonical(16 * leaves);
  for (int64_t row = 0; row < rows.count; ++row) {
    for (int64_t i = 0; i < leaves; ++i) to_canonical(result[row * leaves + i], &canonical[16 * i]);
    result[row] = digest(canonical.data(), canonical.size());
  }
  result.resize(rows.count);
  return result;
}

std::vector<Digest> keys_of_digests(Digest call, const std::vector<std::vector<Digest>>& arguments, int64_t batch) {
  std::vector<Digest> keys(batch);
  core::parallel(batch, kKeysPerThread, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> bytes(16 * (1 + arguments.size()));
    to_canonical(call, bytes.data());
    for (int64_t i = begin; i < end; ++i) {
      for (size_t a = 0; a < arguments.size(); ++a) to_canonical(arguments[a][i], &bytes[16 * (a + 1)]);
      keys[i] = digest(bytes.data(), bytes.size());
    }
  });
  return keys;
}

}  // namespace torchcache::hash
