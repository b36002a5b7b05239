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

Arena::Arena(const Tensor& chunk) : device_(core::device_of(chunk)), shape_(chunk) { add(0, chunk); }

void Arena::add(int64_t first, const Tensor& chunk) {
  if (!chunk.is_contiguous() || core::device_of(chunk) != device_)
    throw std::invalid_argument("chunks must be contiguous, and on one device");
  if (!chunks_.empty() && chunks_.back().first == first) return;
  chunks_.push_back({first, chunk.size(0), static_cast<uint8_t*>(chunk.mutable_data_ptr()), chunk});
}

const Arena::Chunk& Arena::chunk_of(int64_t slot) const {
  if (chunks_.size() == 1) return chunks_[0];
  return *--std::upper_bound(chunks_.begin(), chunks_.end(), slot,
                             [](int64_t wanted, const Chunk& c) { return wanted < c.first; });
}

const uint8_t* Arena::row(int64_t slot) const {
  const Chunk& chunk = chunk_of(slot);
  return chunk.rows + (slot - chunk.first) * shape_.row_bytes();
}

bool Arena::is_readable() const { return device_ == kCpu || device_gather() != nullptr; }

torch::stable::Tensor Arena::gather(const int64_t* slots, int64_t n, bool pinned) const {
  const int64_t row_bytes = shape_.row_bytes();
  Tensor result = shape_.empty(n, device_, pinned);
  auto* out = static_cast<uint8_t*>(result.mutable_data_ptr());
  if (device_ != kCpu) {
    std::vector<const uint8_t*> rows(n);
    for (int64_t i = 0; i < n; ++i) rows[i] = row(slots[i]);
    device_gather()(device_, rows, row_bytes, out);
    return result;
  }
  core::parallel(n, kBytesPerThread / std::max<int64_t>(1, row_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (i + kAhead < end) fetch(row(slots[i + kAhead]), std::min(row_bytes, kFetched));
      memcpy(out + i * row_bytes, row(slots[i]), row_bytes);
    }
  });
  return result;
}

bool Arena::is_writable(const Tensor& rows, int64_t first, int64_t n) const {
  if (device_ != kCpu || !rows.is_cpu() || !rows.is_contiguous() || rows.dim() == 0) return false;
  if (core::RowShape(rows).row_bytes() != shape_.row_bytes() || !core::has_bytes(rows)) return false;
  const Chunk& chunk = chunk_of(first);
  return first + n <= chunk.first + chunk.count;
}

void Arena::write(const Tensor& rows, const std::vector<int64_t>& positions, int64_t first) const {
  const auto* from = static_cast<const uint8_t*>(rows.const_data_ptr());
  const Chunk& chunk = chunk_of(first);
  const int64_t bytes = shape_.row_bytes(), n = static_cast<int64_t>(positions.size());
  uint8_t* to = chunk.rows + (first - chunk.first) * bytes;
  core::parallel(n, kBytesPerThread / std::max<int64_t>(1, bytes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) memcpy(to + i * bytes, from + positions[i] * bytes, bytes);
  });
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

bool Arenas::write(int64_t layout, int64_t first, const std::vector<Tensor>& leaves,
                   const std::vector<int64_t>& positions) const {
  const auto arenas = of(layout);
  const auto n = static_cast<int64_t>(positions.size());
  if (arenas == nullptr || arenas->size() != leaves.size()) return false;
  for (size_t i = 0; i < leaves.size(); ++i)
    if (!(*arenas)[i].is_writable(leaves[i], first, n)) return false;
  for (size_t i = 0; i < leaves.size(); ++i) (*arenas)[i].write(leaves[i], positions, first);
  return true;
}

}  // namespace torchcache::memory
