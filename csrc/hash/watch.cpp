#include "hash/watch.h"

#include <algorithm>
#include <cstring>

#include "hash/dtypes.h"
#include "hash/xxh3.h"

namespace torchcache {
namespace {

using torch::stable::Tensor;

// The running value of a probe; order matters.
struct Mix {
  uint64_t value = xxh3::kPrime64_1;
  void operator()(uint64_t word) { value = xxh3::fold(value ^ word, xxh3::kPrime64_3) + xxh3::kPrime64_2; }
};

// Elements before the one at a logical position.
int64_t offset_of(int64_t position, const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  int64_t offset = 0;
  for (size_t d = sizes.size(); d-- > 0; position /= sizes[d]) offset += position % sizes[d] * strides[d];
  return offset;
}

uint64_t word_at(const uint8_t* p, int64_t item) {
  uint64_t word = 0;
  memcpy(&word, p, std::min<int64_t>(item, 8));
  return word;
}

}  // namespace

Watch::Watch(std::vector<Tensor> tensors) : tensors_(std::move(tensors)) {}

int64_t Watch::probe() const {
  Mix mix;
  for (const Tensor& t : tensors_) {
    const auto* data = static_cast<const uint8_t*>(t.const_data_ptr());
    const int64_t item = item_size(t);
    mix(reinterpret_cast<uintptr_t>(data));
    mix(static_cast<uint64_t>(t.scalar_type()));
    const auto sizes = t.sizes(), strides = t.strides();
    int64_t n = 1, last = 0;
    for (size_t d = 0; d < sizes.size(); ++d) {
      mix(static_cast<uint64_t>(sizes[d]));
      mix(static_cast<uint64_t>(strides[d]));
      n *= sizes[d], last += (sizes[d] - 1) * strides[d];
    }
    if (!t.is_cpu() || n == 0 || data == nullptr || !has_bytes(t, last, item)) continue;
    const bool dense = last == n - 1;  // then any order of the dimensions will do
    for (const int64_t position : {int64_t{0}, n / 3, n / 2 + n / 7, n - 1})
      mix(word_at(data + (dense ? position : offset_of(position, t)) * item, item));
  }
  return static_cast<int64_t>(mix.value);
}

}  // namespace torchcache
