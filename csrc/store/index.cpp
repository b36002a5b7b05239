// Open addressing with linear probing, at most half full, growing by half.
#include "store/index.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "store/format/bytes.h"
#include "store/os/file.h"

namespace torchcache::store {
Block to_block(const BlockHeader& header, uint32_t segment, uint32_t layout) {
  Block block;
  block.segment = segment;
  block.layout = layout;
  block.rows = header.rows;
  block.row_bytes = static_cast<uint32_t>(header.row_bytes);
  block.payload_offset = static_cast<uint32_t>(header.payload_offset());
  block.payload_bytes = static_cast<uint32_t>(header.payload_bytes);
  block.codec = header.codec;
  return block;
}

uint32_t Index::intern(const std::string& layout) {
  const auto [place, added] = numbers_.emplace(layout, static_cast<uint32_t>(layouts_.size()));
  if (added) layouts_.push_back(&place->first);
  return place->second;
}

uint32_t Index::layout_number(const std::string& layout) const {
  const auto number = numbers_.find(layout);
  return number == numbers_.end() ? kNone : number->second;
}

uint32_t Index::add_block(const Block& block) {
  blocks_.push_back(block);
  return static_cast<uint32_t>(blocks_.size() - 1);
}

bool Index::same_place(const Entry& a, const Entry& b) const {
  const Block &x = blocks_[a.block], &y = blocks_[b.block];
  return a.row == b.row && x.segment == y.segment && x.payload_offset == y.payload_offset;
}

void Index::reserve(uint64_t rows) {
  const uint64_t all = std::min<uint64_t>(entries_ + rows, kNone - 1);
  if (all * sizeof(Entry) > entry_pages_.size())
    entry_pages_.grow(std::max<uint64_t>(all * 3 / 2, 170) * sizeof(Entry));
  const uint64_t needed = 2 * all + 1;
  if (needed > slot_count_) rebuild(std::max<uint64_t>(needed, slot_count_ * 3 / 2 + 64));
}

void Index::rebuild(size_t slot_count) {
  slot_pages_ = Pages();  // the old ones go before the new ones come
  slot_pages_.grow(slot_count * sizeof(uint32_t));
  slot_count_ = slot_count;
  uint32_t* const slots = this->slots();
  for (uint32_t number = 0; number < entries_; ++number) {
    size_t s = slot(entry(number).low);
    while (slots[s] != 0) s = next(s);
    slots[s] = number + 1;
    last_slot_ = s;
  }
}

// Adds a row whose key is greater than all others. False if that is not certain: then nothing is done.
inline bool Index::append(const Entry& added) {
  if (!ascending_) return false;
  const size_t own = slot(added.low);
  const size_t s = entries_ == 0 ? own : std::max(own, last_slot_ + 1);
  ascending_ = (entries_ == 0 || added.low > entry(entries_ - 1).low) && s < slot_count_ && s - own < kLongestProbe;
  if (!ascending_) return false;
  entry(entries_) = added;
  slots()[s] = ++entries_;
  last_slot_ = s;
  ++keys_;
  return true;
}

inline void Index::insert_one(const Entry& added) {
  Entry* dead = nullptr;
  uint32_t* const slots = this->slots();
  size_t live = 0, probe = 0, s = slot(added.low);
  for (; slots[s] != 0; s = next(s), ++probe) {
    Entry& present = entry(slots[s] - 1);
    if (present.low != added.low) continue;
    if (present.block == kNone) {
      dead = &present;
    } else if (same_place(present, added) || ++live == kMaxCopies) {
      return;
    }
  }
  if (live == 0) ++keys_;
  if (dead != nullptr) {
    *dead = added;
    return;
  }
  entry(entries_) = added;
  slots[s] = ++entries_;
  if (probe < kLongestProbe) return;
  scramble_ = load<uint64_t>(random_id().data()) | 1;
  rebuild(slot_count_);
}

void Index::insert(const Entry* entries, size_t n, uint32_t first_block) {
  constexpr size_t kAhead = 16;
  n = std::min<size_t>(n, kNone - 1 - entries_);
  reserve(n);
  for (size_t i = 0; i < n; ++i) {
    if (i + kAhead < n) __builtin_prefetch(&slots()[slot(entries[i + kAhead].low)], 1);
    const Entry added = {entries[i].low, entries[i].check, entries[i].block + first_block, entries[i].row};
    if (!append(added)) insert_one(added);
  }
}

void Index::prefetch(const Digest* keys, size_t n) const {
  if (slot_count_ == 0) return;
  for (size_t i = 0; i < n; ++i) __builtin_prefetch(&slots()[slot(keys[i].low)]);
  for (size_t i = 0; i < n; ++i) {
    const uint32_t number = slots()[slot(keys[i].low)];
    if (number != 0) __builtin_prefetch(&entry(number - 1));
  }
}

bool Index::drop(uint64_t low, uint32_t block, uint32_t row) {
  const Entry* dropped = find(low, [&](const Entry& e) { return e.block == block && e.row == row; });
  if (dropped == nullptr) return false;
  const_cast<Entry*>(dropped)->block = kNone;
  if (find(low, [](const Entry&) { return true; }) == nullptr) --keys_;
  return true;
}

void Index::drop_segment(uint32_t segment) {
  for (uint32_t number = 0; number < entries_; ++number) {
    const Entry& e = entry(number);
    if (e.block != kNone && blocks_[e.block].segment == segment) drop(e.low, e.block, e.row);
  }
}

uint64_t Index::memory_bytes() const {
  return slot_count_ * sizeof(uint32_t) + entries_ * sizeof(Entry) + blocks_.capacity() * sizeof(Block);
}

}  // namespace torchcache::store
