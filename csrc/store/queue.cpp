// First in, first out; a map from keys to rows beside it.
#include "store/queue.h"

#include <algorithm>

namespace torchcache::store {

namespace {
constexpr size_t kMostSlices = 512;  // each is a part of one write
}  // namespace

Queue::Row Queue::find(const Digest& key) const {
  const auto found = found_.find(key);
  if (found == found_.end()) return {};
  return {*found->second.first, found->second.second};
}

void Queue::push(std::shared_ptr<const Batch> batch) {
  const size_t rows = batch->keys.size();
  if (rows == 0) return;
  rows_ += rows;
  bytes_ += rows * batch->row_bytes;
  cost_ += rows * batch->row_cost;
  batches_.push_back(std::move(batch));
  const auto& last = batches_.back();  // a deque keeps the place of its elements
  for (size_t row = 0; row < rows; ++row) found_[last->keys[row]] = {&last, row};
}

std::vector<Slice> Queue::front(uint64_t bytes, uint64_t rows) const {
  std::vector<Slice> slices;
  size_t first = taken_;
  for (const auto& batch : batches_) {
    if (slices.size() == kMostSlices || rows == 0) break;
    const Batch& oldest = *batches_.front();
    if (batch->layout != oldest.layout || batch->row_bytes != oldest.row_bytes) break;
    const uint64_t size = std::max<uint64_t>(batch->row_bytes, 1);
    uint64_t count = std::min<uint64_t>({batch->keys.size() - first, bytes / size, rows});
    if (count == 0 && slices.empty()) count = 1;
    if (count == 0) break;
    slices.push_back({batch, first, count});
    bytes -= std::min(bytes, count * size);
    rows -= count;
    if (first + count < batch->keys.size()) break;
    first = 0;
  }
  return slices;
}

void Queue::forget(const Batch& batch, size_t first, size_t count) {
  for (size_t row = first; row < first + count; ++row) {
    const auto found = found_.find(batch.keys[row]);
    if (found != found_.end() && found->second.first->get() == &batch && found->second.second == row)
      found_.erase(found);
  }
  rows_ -= count;
  bytes_ -= count * batch.row_bytes;
  cost_ -= count * batch.row_cost;
}

void Queue::pop(const std::vector<Slice>& slices) {
  for (const Slice& slice : slices) {
    if (batches_.empty() || batches_.front() != slice.batch || taken_ != slice.first) return;
    forget(*slice.batch, slice.first, slice.count);
    taken_ += slice.count;
    if (taken_ < slice.batch->keys.size()) continue;
    batches_.pop_front();
    taken_ = 0;
  }
}

void Queue::clear() {
  batches_.clear();
  found_.clear();
  taken_ = 0;
  rows_ = bytes_ = cost_ = 0;
}

}  // namespace torchcache::store
