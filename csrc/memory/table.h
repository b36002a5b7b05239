// The key table of the memory tier: which row of which arena holds the output of a key. No torch here.
#pragma once

#include <cstdint>
#include <shared_mutex>
#include <vector>

#include "core/fork.h"
#include "hash/digest.h"

namespace torchcache::memory {

using hash::Digest;

// Where a row lies: the number of its layout and its slot in that layout's arena.
struct RowLocation {
  int64_t layout = -1;
  int64_t slot = -1;
};

// The result of a lookup of a batch, apart from the slots.
struct Lookup {
  std::vector<int64_t> missing;  // for each distinct missing key, the first row of the batch that has it
  int64_t layout = kNone;        // of all rows that were found

  static constexpr int64_t kNone = -1;   // nothing was found
  static constexpr int64_t kMixed = -2;  // rows of several layouts were found
};

// Open addressing by the low half of the key, 32 bytes an entry, at most 3/4 full. Thread-safe: lookups share a lock.
class KeyTable {
 public:
  KeyTable();

  // slots[i] ≥ 0: the row is in that slot; -1 - j: it is the j-th distinct missing row.
  Lookup lookup(const Digest* keys, size_t n, int64_t* slots) const;

  // Keys get the slots first, first + 1, …; a key that is there already keeps its location.
  void insert(const Digest* keys, size_t n, int64_t layout, int64_t first);

  // The location of a key known by its low half; layout -1 if there is none.
  RowLocation find(uint64_t low) const;

  // The low halves of all keys, in no order.
  std::vector<int64_t> low_keys() const;

 private:
  struct Entry {
    Digest key;
    RowLocation location;
  };

  void after_fork(bool child);

  size_t position(Digest key) const;  // of the key, or of the empty entry where it belongs
  void grow();

  mutable std::shared_mutex mutex_;
  std::vector<Entry> entries_;  // a power of two; empty where slot is -1
  size_t used_ = 0;
  core::AtFork at_fork_{[this] { mutex_.lock(); }, [this](bool child) { after_fork(child); }};
};

}  // namespace torchcache::memory
