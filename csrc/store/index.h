// The table in memory that says where each key's rows are: 24 bytes a row and a u32 slot.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "store/format/format.h"
#include "store/os/pages.h"

namespace torchcache::store {

// A block of some segment, as far as reading its rows needs it.
struct Block {
  uint32_t segment = 0;  // number in the store's list of segments
  uint32_t layout = 0;   // number given by Index::intern
  uint32_t rows = 0;
  uint32_t row_bytes = 0;
  uint32_t payload_offset = 0;  // in the segment
  uint32_t payload_bytes = 0;
  Codec codec = Codec::kRaw;
};

Block to_block(const BlockHeader& header, uint32_t segment, uint32_t layout);

// Not thread-safe: guarded by the store's mutex. A dropped entry stays as a dead one until its key
// comes again. The high half of a key is not stored: it is part of the row check.
class Index {
 public:
  static constexpr uint32_t kNone = 0xffffffff;

  Index() = default;
  Index(Index&&) = default;
  Index& operator=(Index&&) = default;

  uint32_t intern(const std::string& layout);               // the number of a layout, from 0
  uint32_t layout_number(const std::string& layout) const;  // kNone if never interned
  const std::string& layout(uint32_t number) const { return *layouts_[number]; }

  uint32_t add_block(const Block& block);
  const Block& block(uint32_t number) const { return blocks_[number]; }
  uint32_t blocks() const { return static_cast<uint32_t>(blocks_.size()); }

  // Room for that many rows more, in one step.
  void reserve(uint64_t rows);
  // Does nothing if this row of this place is here already, or eight rows of this key are.
  void insert(const Entry& entry) { insert(&entry, 1, 0); }
  // Many at once, fastest in the order of their keys. `first_block` is added to their block numbers.
  void insert(const Entry* entries, size_t n, uint32_t first_block);

  // Brings the slots and entries of these keys into the processor's cache.
  void prefetch(const Digest* keys, size_t n) const;
  // The first live entry of this key, in order of insertion, for which accept(entry) is true; null if none.
  template <class Accept>
  const Entry* find(uint64_t low, Accept accept) const;
  // The same for accept(block of the entry).
  template <class Accept>
  const Entry* find_by_block(uint64_t low, Accept accept) const {
    return find(low, [&](const Entry& entry) { return accept(blocks_[entry.block]); });
  }

  // Makes this row of this block dead. False if it was not here.
  bool drop(uint64_t low, uint32_t block, uint32_t row);
  // Makes all rows of a segment dead.
  void drop_segment(uint32_t segment);

  uint64_t keys() const { return keys_; }  // distinct and live, by their low halves
  uint64_t memory_bytes() const;

 private:
  static constexpr size_t kLongestProbe = 512;
  static constexpr size_t kMaxCopies = 8;

  Entry& entry(uint32_t number) const { return static_cast<Entry*>(entry_pages_.data())[number]; }
  uint32_t* slots() const { return static_cast<uint32_t*>(slot_pages_.data()); }
  // In order of the keys, so that sorted indexes are inserted from front to back; unless keys that
  // are no digests crowd together: then scramble_ becomes a random odd number.
  size_t slot(uint64_t low) const {
    return static_cast<size_t>(static_cast<unsigned __int128>(low * scramble_) * slot_count_ >> 64);
  }
  size_t next(size_t slot) const { return slot + 1 == slot_count_ ? 0 : slot + 1; }
  bool same_place(const Entry& a, const Entry& b) const;
  void rebuild(size_t slots);
  bool append(const Entry& entry);
  void insert_one(const Entry& entry);

  Pages slot_pages_;   // slot_count_ times the number of an entry + 1; 0 is free
  Pages entry_pages_;  // entries_ of them
  size_t slot_count_ = 0;
  uint32_t entries_ = 0;
  uint64_t keys_ = 0;
  uint64_t scramble_ = 1;
  // While every key so far was greater than the one before, the next greater one belongs behind the last: an index that
  // is opened first needs no probing.
  bool ascending_ = true;
  size_t last_slot_ = 0;
  std::vector<Block> blocks_;
  std::unordered_map<std::string, uint32_t> numbers_;
  std::vector<const std::string*> layouts_;  // point into numbers_
};

template <class Accept>
const Entry* Index::find(uint64_t low, Accept accept) const {
  if (slot_count_ == 0) return nullptr;
  for (size_t s = slot(low); slots()[s] != 0; s = next(s)) {
    const Entry& candidate = entry(slots()[s] - 1);
    if (candidate.low == low && candidate.block != kNone && accept(candidate)) return &candidate;
  }
  return nullptr;
}

}  // namespace torchcache::store
