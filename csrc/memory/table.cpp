#include "memory/table.h"

#include <mutex>
#include <new>

namespace torchcache::memory {
namespace {

constexpr size_t kFirstCapacity = 1024;

// Numbers the distinct missing keys of one batch in the order in which they appear.
class Distinct {
 public:
  explicit Distinct(const Digest* keys, size_t n) : keys_(keys), batch_(n) {}

  int64_t number(size_t row, std::vector<int64_t>& missing) {
    if (heads_.empty()) {
      size_t capacity = 16;
      while (capacity < 2 * batch_) capacity *= 2;
      heads_.assign(capacity, -1);
    }
    size_t at = keys_[row].low & (heads_.size() - 1);
    while (heads_[at] >= 0 && keys_[missing[heads_[at]]] != keys_[row]) at = (at + 1) & (heads_.size() - 1);
    if (heads_[at] < 0) {
      heads_[at] = static_cast<int64_t>(missing.size());
      missing.push_back(static_cast<int64_t>(row));
    }
    return heads_[at];
  }

 private:
  const Digest* keys_;
  size_t batch_;
  std::vector<int64_t> heads_;
};

}  // namespace

KeyTable::KeyTable() : entries_(kFirstCapacity) {}

void KeyTable::after_fork(bool child) {
  if (child) {
    new (&mutex_) std::shared_mutex;  // it remembers the thread that took it, which here has another number
  } else {
    mutex_.unlock();
  }
}

size_t KeyTable::position(Digest key) const {
  const size_t mask = entries_.size() - 1;
  size_t at = key.low & mask;
  while (entries_[at].location.slot >= 0 && entries_[at].key != key) at = (at + 1) & mask;
  return at;
}

Lookup KeyTable::lookup(const Digest* keys, size_t n, int64_t* slots) const {
  constexpr size_t kAhead = 8;  // entries of a large table are cold: fetch those of the next keys
  Lookup result;
  Distinct distinct(keys, n);
  std::shared_lock lock(mutex_);
  for (size_t i = 0; i < n; ++i) {
    if (i + kAhead < n) __builtin_prefetch(&entries_[keys[i + kAhead].low & (entries_.size() - 1)]);
    const RowLocation location = entries_[position(keys[i])].location;
    if (location.slot < 0) {
      slots[i] = -1 - distinct.number(i, result.missing);
      continue;
    }
    slots[i] = location.slot;
    if (result.layout == Lookup::kNone) result.layout = location.layout;
    if (result.layout != location.layout) result.layout = Lookup::kMixed;
  }
  return result;
}

void KeyTable::insert(const Digest* keys, size_t n, int64_t layout, int64_t first) {
  std::unique_lock lock(mutex_);
  for (size_t i = 0; i < n; ++i) {
    if (4 * (used_ + 1) > 3 * entries_.size()) grow();
    Entry& entry = entries_[position(keys[i])];
    if (entry.location.slot >= 0) continue;
    entry = {keys[i], {layout, first + static_cast<int64_t>(i)}};
    ++used_;
  }
}

RowLocation KeyTable::find(uint64_t low) const {
  std::shared_lock lock(mutex_);
  const size_t mask = entries_.size() - 1;
  size_t at = low & mask;
  while (entries_[at].location.slot >= 0 && entries_[at].key.low != low) at = (at + 1) & mask;
  return entries_[at].location;
}

std::vector<int64_t> KeyTable::low_keys() const {
  std::shared_lock lock(mutex_);
  std::vector<int64_t> result;
  result.reserve(used_);
  for (const Entry& entry : entries_)
    if (entry.location.slot >= 0) result.push_back(static_cast<int64_t>(entry.key.low));
  return result;
}

void KeyTable::grow() {
  std::vector<Entry> old(2 * entries_.size());
  old.swap(entries_);
  for (const Entry& entry : old)
    if (entry.location.slot >= 0) entries_[position(entry.key)] = entry;
}

}  // namespace torchcache::memory
