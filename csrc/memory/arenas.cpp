#include "memory/arenas.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "core/parallel.h"
#include "core/tensors.h"
#include "memory/gather.h"

namespace torchcache::memory {
namespace {

using core::kCpu;

constexpr int64_t kBytesPerThread = 512 << 10;  // measured: below, a second thread costs more than it brings
constexpr int64_t kAhead = 4, kFetched = 512;   // rows, and bytes of each: the processor finds the rest by itself

void fetch(const uint8_t* from, int64_t bytes) {
  constexpr int64_t kLine = 64;
  for (int64_t at = 0; at < bytes; at += kLine) __builtin_prefetch(from + at);
}

}  // namespace

Arena::Arena(const Tensor& chunk)
    : device_(core::device_of(chunk)),
      row_bytes_(core::item_size(chunk)),
      sizes_(chunk.sizes().begin(), chunk.sizes().end()),
      strides_(sizes_.size(), 1) {
  if (sizes_.empty()) throw std::invalid_argument("chunks must be tensors [rows, ...]");
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(chunk.get(), &dtype_));
  for (size_t d = sizes_.size(); d-- > 1; row_bytes_ *= sizes_[d]) strides_[d - 1] = strides_[d] * sizes_[d];
  add(0, chunk);
}

void Arena::add(int64_t first, const Tensor& chunk) {
  if (!chunk.is_contiguous() || core::device_of(chunk) != device_)
    throw std::invalid_argument("chunks must be contiguous, and on one device");
  chunks_.push_back({first, static_cast<const uint8_t*>(chunk.const_data_ptr()), chunk});
}

const uint8_t* Arena::row(int64_t slot) const {
  const Chunk* chunk = &chunks_[0];
  if (chunks_.size() > 1)
    chunk = &*--std::upper_bound(chunks_.begin(), chunks_.end(), slot,
                                 [](int64_t wanted, const Chunk& c) { return wanted < c.first; });
  return chunk->rows + (slot - chunk->first) * row_bytes_;
}

bool Arena::is_readable() const { return device_ == kCpu || device_gather() != nullptr; }

torch::stable::Tensor Arena::gather(const int64_t* slots, int64_t n, bool pinned) const {
  Tensor result = device_ == kCpu && pinned ? new_pinned(n) : new_rows(n);
  auto* out = static_cast<uint8_t*>(result.mutable_data_ptr());
  if (device_ != kCpu) {
    std::vector<const uint8_t*> rows(n);
    for (int64_t i = 0; i < n; ++i) rows[i] = row(slots[i]);
    device_gather()(device_, rows, row_bytes_, out);
    return result;
  }
  core::parallel(n, kBytesPerThread / std::max<int64_t>(1, row_bytes_), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (i + kAhead < end) fetch(row(slots[i + kAhead]), std::min(row_bytes_, kFetched));
      memcpy(out + i * row_bytes_, row(slots[i]), row_bytes_);
    }
  });
  return result;
}

torch::stable::Tensor Arena::new_rows(int64_t n) const {
  std::vector<int64_t> shape = sizes_;
  shape[0] = n;
  const int32_t type = device_ == kCpu ? aoti_torch_device_type_cpu() : aoti_torch_device_type_cuda();
  AtenTensorHandle handle;  // not through the dispatcher, which would cost a microsecond
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides_.data(),
                                                  dtype_, type, device_ == kCpu ? 0 : device_, &handle));
  return Tensor(handle);
}

torch::stable::Tensor Arena::new_pinned(int64_t n) const {
  std::vector<int64_t> shape = sizes_;
  shape[0] = n;
  using torch::headeronly::DeviceType;
  return torch::stable::empty(shape, chunks_[0].owner.scalar_type(), std::nullopt,
                              torch::stable::Device(DeviceType::CPU), /*pin_memory=*/true);
}

void Arenas::add(int64_t layout, int64_t first, const std::vector<Tensor>& leaves) {
  core::MutexLock lock(mutex_);
  layouts_.resize(std::max(layouts_.size(), static_cast<size_t>(layout) + 1));
  // A copy, for others may be reading what is there.
  auto arenas = layouts_[layout] == nullptr ? std::make_shared<Leaves>(leaves.begin(), leaves.end())
                                            : std::make_shared<Leaves>(*layouts_[layout]);
  if (layouts_[layout] != nullptr)
    for (size_t i = 0; i < leaves.size(); ++i) (*arenas)[i].add(first, leaves[i]);
  layouts_[layout] = std::move(arenas);
}

std::shared_ptr<const Arenas::Leaves> Arenas::of(int64_t layout) const {
  core::MutexLock lock(mutex_);
  return layout >= 0 && layout < static_cast<int64_t>(layouts_.size()) ? layouts_[layout] : nullptr;
}

std::vector<torch::stable::Tensor> Arenas::gather(int64_t layout, const int64_t* slots, size_t n, bool pinned) const {
  std::vector<Tensor> result;
  const auto leaves = of(layout);
  if (leaves == nullptr || !std::all_of(leaves->begin(), leaves->end(), [](const Arena& a) { return a.is_readable(); }))
    return result;
  result.reserve(leaves->size());
  for (const Arena& arena : *leaves) result.push_back(arena.gather(slots, static_cast<int64_t>(n), pinned));
  return result;
}

}  // namespace torchcache::memory
