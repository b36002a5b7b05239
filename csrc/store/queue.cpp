// First in, first out; and a map from keys to rows.
#include "store/queue.h"

#include <algorithm>

namespace torchcache::store {

namespace {
constexpr size_t kMaxSlices = 512;  // each is a part of one write
}  // namespace

Queue::Row Queue::find(const Digest& key) const {
  const auto entry = rows_by_key_.find(key);
  if (entry == rows_by_key_.end()) return {};
  return {*entry->second.first, entry->second.second};
}

void Queue::push(std::shared_ptr<const Batch> batch) {
  const size_t rows = batch->keys.size();
  if (rows == 0) return;
  rows_ += rows;
  bytes_ += rows * batch->row_bytes;
  cost_ += rows * batch->row_cost;
  batches_.push_back(std::move(batch));
  const auto& last = batches_.back();  // the elements of a deque do not move
  for (size_t row = 0; row < rows; ++row) rows_by_key_[last->keys[row]] = {&last, row};
}

std::vector<Slice> Queue::front(uint64_t bytes, uint64_t rows) const {
  std::vector<Slice> slices;
  size_t first = popped_;
  for (const auto& batch : batches_) {
    if (slices.size() == kMaxSlices || rows == 0) break;
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

void Queue::drop(const Batch& batch, size_t first, size_t count) {
  for (size_t row = first; row < first + count; ++row) {
    const auto entry = rows_by_key_.find(batch.keys[row]);
    if (entry != rows_by_key_.end() && entry->second.first->get() == &batch && entry->second.second == row)
      rows_by_key_.erase(entry);
  }
  rows_ -= count;
  bytes_ -= count * batch.row_bytes;
  cost_ -= count * batch.row_cost;
}

void Queue::pop(const std::vector<Slice>& slices) {
  for (const Slice& slice : slices) {
    if (batches_.empty() || batches_.front() != slice.batch || popped_ != slice.first) return;
    drop(*slice.batch, slice.first, slice.count);
    popped_ += slice.count;
    if (popped_ < slice.batch->keys.size()) continue;
    batches_.pop_front();
    popped_ = 0;
  }
}

void Queue::clear() {
  batches_.clear();
  rows_by_key_.clear();
  popped_ = 0;
  rows_ = bytes_ = cost_ = 0;
}

}  // namespace torchcache::store
