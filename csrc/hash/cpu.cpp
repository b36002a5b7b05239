// Row digests on the CPU: rows are cut in leaves of 4096 bytes, leaves of all rows are shared out among torch's
// threads.
#include "hash/cpu.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "hash/digest.h"
#include "hash/dtypes.h"
#include "hash/new_tensor.h"
#include "parallel.h"

namespace torchcache {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Measured: below about 1 MB of input a second thread costs more than it brings.
constexpr int64_t kLeavesPerThread = 192;
constexpr int64_t kKeysPerThread = 4096;

// Where the bytes of a row lie: runs of contiguous bytes, enumerated in logical order.
class Rows {
 public:
  // With `whole` the tensor is one row, otherwise dimension 0 counts the rows.
  Rows(const Tensor& t, bool whole)
      : owner_(t), base_(static_cast<const uint8_t*>(t.const_data_ptr())), run_(item_size(t)) {
    if (!has_bytes(t)) throw std::invalid_argument("there is no memory behind a tensor (was its storage resized?)");
    const auto sizes = t.sizes();
    const auto strides = t.strides();
    const size_t first = whole ? 0 : 1;
    if (!whole) count_ = sizes[0], row_stride_ = strides[0] * run_;
    const int64_t item = run_;
    for (size_t d = sizes.size(); d-- > first;) add_outer(sizes[d], strides[d] * item);
    row_bytes_ = run_;
    for (const Dim& d : outer_) row_bytes_ *= d.size;
    std::reverse(outer_.begin(), outer_.end());
  }

  int64_t count() const { return count_; }
  int64_t row_bytes() const { return row_bytes_; }
  int64_t leaves() const { return std::max<int64_t>(1, (row_bytes_ + kLeafBytes - 1) / kLeafBytes); }

  Digest leaf(int64_t row, int64_t index) const {
    const uint8_t* start = base_ + row * row_stride_;
    const int64_t begin = index * static_cast<int64_t>(kLeafBytes);
    const int64_t size = std::min<int64_t>(kLeafBytes, row_bytes_ - begin);
    if (outer_.empty()) return digest(start + begin, size);
    uint8_t buffer[kLeafBytes];
    gather(start, begin, size, buffer);
    return digest(buffer, size);
  }

 private:
  struct Dim {
    int64_t size, stride;  // stride in bytes
  };

  // From the innermost dimension outwards; what continues the one before is merged into it.
  void add_outer(int64_t size, int64_t stride) {
    if (size == 1) return;
    if (outer_.empty() && stride == run_) {
      run_ *= size;
    } else if (!outer_.empty() && stride == outer_.back().size * outer_.back().stride) {
      outer_.back().size *= size;
    } else {
      outer_.push_back({size, stride});
    }
  }

  void gather(const uint8_t* start, int64_t begin, int64_t size, uint8_t* out) const {
    while (size > 0) {
      int64_t run = begin / run_;
      const int64_t skip = begin % run_;
      const Dim& inner = outer_.back();
      const int64_t at = run % inner.size;
      const uint8_t* p = start + at * inner.stride;
      run /= inner.size;
      for (size_t d = outer_.size() - 1; d-- > 0; run /= outer_[d].size) p += (run % outer_[d].size) * outer_[d].stride;
      for (int64_t i = at, from = skip; i < inner.size && size > 0; ++i, p += inner.stride, from = 0) {
        const int64_t n = std::min(run_ - from, size);
        copy(out, p + from, n);
        out += n, size -= n, begin += n;
      }
    }
  }

  // Elements of the usual sizes as single moves: runs of one element are what channels_last gives.
  static void copy(uint8_t* out, const uint8_t* in, int64_t n) {
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

  Tensor owner_;
  const uint8_t* base_;
  int64_t run_;  // bytes that lie together
  int64_t row_bytes_ = 0, count_ = 1, row_stride_ = 0;
  std::vector<Dim> outer_;
};

// Row digests of all rows.
std::vector<Digest> row_digests(const Rows& rows) {
  const int64_t leaves = rows.leaves(), total = rows.count() * leaves;
  std::vector<Digest> result(total);
  const int64_t leaf_bytes = std::clamp<int64_t>(rows.row_bytes(), 1, kLeafBytes);
  parallel(total, kLeavesPerThread * static_cast<int64_t>(kLeafBytes) / leaf_bytes, [&](int64_t begin, int64_t end) {
    int64_t row = begin / leaves, leaf = begin % leaves;
    for (int64_t i = begin; i < end; ++i) {
      result[i] = rows.leaf(row, leaf);
      if (++leaf == leaves) leaf = 0, ++row;
    }
  });
  if (leaves == 1) return result;
  std::vector<uint8_t> canonical(16 * leaves);
  for (int64_t row = 0; row < rows.count(); ++row) {
    for (int64_t leaf = 0; leaf < leaves; ++leaf) to_canonical(result[row * leaves + leaf], &canonical[16 * leaf]);
    result[row] = digest(canonical.data(), canonical.size());
  }
  result.resize(rows.count());
  return result;
}

}  // namespace

std::vector<Digest> keys_of_rows(const std::vector<Tensor>& rows, const Tensor& call) {
  if (rows.empty()) throw std::invalid_argument("keys needs at least one tensor");
  if (call.numel() != 2 || call.scalar_type() != ScalarType::Long)
    throw std::invalid_argument("the call digest must be int64 [2]");
  std::vector<std::vector<Digest>> arguments;
  const int64_t batch = rows[0].dim() > 0 ? rows[0].size(0) : 0;
  for (const Tensor& t : rows) {
    if (t.dim() == 0 || t.size(0) != batch)
      throw std::invalid_argument("all tensors must have the same batch dimension");
    if (!t.is_cpu()) throw std::invalid_argument("keys of CPU tensors only");
    arguments.push_back(row_digests(Rows(t, /*whole=*/false)));
  }
  const auto* halves = static_cast<const int64_t*>(call.const_data_ptr());
  const Digest prefix{static_cast<uint64_t>(halves[0]), static_cast<uint64_t>(halves[1])};
  std::vector<Digest> keys(batch);
  parallel(batch, kKeysPerThread, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> bytes(16 * (1 + arguments.size()));
    to_canonical(prefix, bytes.data());
    for (int64_t i = begin; i < end; ++i) {
      for (size_t a = 0; a < arguments.size(); ++a) to_canonical(arguments[a][i], &bytes[16 * (a + 1)]);
      keys[i] = digest(bytes.data(), bytes.size());
    }
  });
  return keys;
}

Tensor digests_cpu(std::vector<Tensor> tensors) {
  Tensor result = new_int64(tensors.size(), 2);
  auto* out = static_cast<Digest*>(result.mutable_data_ptr());
  for (const Tensor& t : tensors) {
    if (!t.is_cpu()) throw std::invalid_argument("digests of CPU tensors only");
    *out++ = row_digests(Rows(t, /*whole=*/true))[0];
  }
  return result;
}

}  // namespace torchcache
