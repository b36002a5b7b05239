// Inspects the files of a store while others read and write: what is in them, whether every check holds,
// whether some process still writes them. What cannot be read is a std::runtime_error that names the path and the
// cause.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "store/format/format.h"
#include "store/maintenance/cursor.h"

namespace torchcache::store {

// Whether no process will write to this file any more. Writers lock a file when they have made it, before they write
// to it, so one with bytes and without a lock is finished. Where locks do not work, it is one untouched for a day.
bool is_idle(const std::string& path);

// Removes the file if it is idle. False if it is not, or not there.
bool remove_idle(const std::string& path);

// Rows of one layout and codec.
struct RowGroup {
  std::string layout;
  Codec codec;
  uint64_t rows = 0;
  uint64_t bytes = 0;         // uncompressed
  uint64_t stored_bytes = 0;  // as they are in the file
};

struct Summary {
  bool idle = false;
  uint64_t bytes = 0;
  uint64_t index_bytes = 0;  // 0: no index, or none that is valid
  uint64_t blocks = 0;
  std::vector<RowGroup> groups;
};

// From the index, and from the tables of what it does not cover.
Summary inspect(const std::string& directory, const SegmentId& id);

struct Damage {
  std::string kind;  // "segment header", "no block", "rows", "index", "cut off"
  uint64_t offset;
  uint64_t bytes;
  std::optional<uint64_t> rows;  // none where their number is unknown
};

// Checks a segment in parts.
struct Verification {
  uint64_t position = kHeaderBytes;  // where the next part begins
  bool done = false;
  uint64_t rows = 0;
  std::vector<Damage> damage;
};
// About `bytes` of the segment from `position` on. With the first part its header is checked, with the last its index.
// What a live or killed writer did not finish does not count as damage.
Verification verify(const std::string& directory, const SegmentId& id, uint64_t position, uint64_t bytes);

// Keys and their layouts. Takes up to 64 bytes of memory a row while it grows.
class RowSet {
 public:
  bool insert(const Digest& key, const Digest& layout);  // false if it was there

 private:
  static constexpr uint64_t kScramble = 0x9E3779B97F4A7C15;  // the golden ratio: keys need not be digests
  size_t find(const Digest& row) const;
  void grow();

  std::vector<Digest> slots_;  // all zeros: free
  size_t used_ = 0;
};
// What distinguishes rows of one key: those of another layout or size are other rows.
Digest layout_digest(const BlockHeader& header, const std::string& layout);

// For each segment the rows that were in it, or in one before it, already; and ranges that hold no block.
struct Waste {
  uint64_t duplicates = 0;
  uint64_t holes = 0;
};
std::vector<Waste> find_waste(const std::string& directory, const std::vector<SegmentId>& ids);

// The keys of all rows of this layout.
std::vector<Digest> keys_of(const std::string& directory, const SegmentId& id, const std::string& layout);

}  // namespace torchcache::store
