#include "hash/watch.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <utility>

#include "hash/tensors.h"

namespace torchcache {
namespace {

using torch::stable::Tensor;

// Elements before the one at a logical position.
int64_t offset_of(int64_t position, const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  int64_t offset = 0;
  for (size_t d = sizes.size(); d-- > 0; position /= sizes[d]) offset += position % sizes[d] * strides[d];
  return offset;
}

uint64_t word_at(Word word) {
  uint64_t value = 0;
  memcpy(&value, word.at, word.bytes);
  return value;
}

// What is looked at of a tensor: mixes in where it lies and its shape, and gives the words, none if it has no bytes.
struct Sight {
  std::array<Word, 4> words;
  size_t count = 0;

  Sight(const Tensor& t, Mix& mix) {
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
    if (n == 0 || data == nullptr || !has_bytes(t, last, item)) return;
    const bool dense = last == n - 1;  // then any order of the dimensions will do
    for (const int64_t position : {int64_t{0}, n / 3, n / 2 + n / 7, n - 1})
      words[count++] = {data + (dense ? position : offset_of(position, t)) * item,
                        static_cast<uint64_t>(std::min<int64_t>(item, 8))};
  }
};

std::vector<std::shared_ptr<const WordList>> kept(const std::map<int32_t, std::vector<Word>>& words) {
  std::vector<std::shared_ptr<const WordList>> lists;
  for (const auto& [device, list] : words) lists.push_back(cuda()->keep(device, list));
  return lists;
}

}  // namespace

Watch::Watch(std::vector<Tensor> tensors) : tensors_(std::move(tensors)) {}

Look Watch::look() const {
  Mix mix;
  std::map<int32_t, std::vector<Word>> elsewhere;
  for (const Tensor& t : tensors_) {
    const Sight sight(t, mix);
    if (t.is_cpu()) {
      for (size_t i = 0; i < sight.count; ++i) mix(word_at(sight.words[i]));
    } else if (cuda() != nullptr && t.is_cuda()) {
      mix(sight.count);  // a list must not outlive the bytes
      auto& words = elsewhere[t.get_device_index()];
      words.insert(words.end(), sight.words.begin(), sight.words.begin() + sight.count);
    }
  }
  if (elsewhere.empty()) return {mix.value, {}};
  std::lock_guard lock(mutex_);
  if (lists_.empty() || listed_ != mix.value) lists_ = kept(elsewhere), listed_ = mix.value;
  return {mix.value, lists_};
}

}  // namespace torchcache
