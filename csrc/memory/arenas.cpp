#include "memory/arenas.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "hash/tensors.h"
#include "parallel.h"

namespace torchcache {
namespace {

constexpr int64_t kBytesPerThread = 512 << 10;  // measured: below, a second thread costs more than it brings

}  // namespace

Arenas::Arena::Arena(const Tensor& t)
    : owner(t), row_bytes(item_size(t)), sizes(t.sizes().begin(), t.sizes().end()), strides(sizes.size(), 1) {
  if (!t.is_cpu() || !t.is_contiguous() || sizes.empty())
    throw std::invalid_argument("arenas must be contiguous CPU tensors [capacity, ...]");
  rows = static_cast<const uint8_t*>(t.const_data_ptr());
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  for (size_t d = sizes.size(); d-- > 1; row_bytes *= sizes[d]) strides[d - 1] = strides[d] * sizes[d];
}

torch::stable::Tensor Arenas::Arena::gather(const int64_t* slots, int64_t n) const {
  std::vector<int64_t> shape = sizes;
  shape[0] = n;
  AtenTensorHandle handle;  // not through the dispatcher, which would cost a microsecond
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                                                  dtype, aoti_torch_device_type_cpu(), 0, &handle));
  Tensor result(handle);
  auto* out = static_cast<uint8_t*>(result.mutable_data_ptr());
  parallel(n, kBytesPerThread / std::max<int64_t>(1, row_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) memcpy(out + i * row_bytes, rows + slots[i] * row_bytes, row_bytes);
  });
  return result;
}

void Arenas::add(int64_t layout, const std::vector<Tensor>& leaves) {
  auto arenas = std::make_shared<const Leaves>(leaves.begin(), leaves.end());
  std::lock_guard lock(mutex_);
  layouts_.resize(std::max(layouts_.size(), static_cast<size_t>(layout) + 1));
  layouts_[layout] = std::move(arenas);
}

std::shared_ptr<const Arenas::Leaves> Arenas::of(int64_t layout) const {
  std::lock_guard lock(mutex_);
  return layout >= 0 && layout < static_cast<int64_t>(layouts_.size()) ? layouts_[layout] : nullptr;
}

std::vector<torch::stable::Tensor> Arenas::gather(int64_t layout, const int64_t* slots, size_t n) const {
  std::vector<Tensor> result;
  const auto leaves = of(layout);
  if (leaves == nullptr) return result;
  result.reserve(leaves->size());
  for (const Arena& arena : *leaves) result.push_back(arena.gather(slots, static_cast<int64_t>(n)));
  return result;
}

}  // namespace torchcache
