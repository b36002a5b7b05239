// What maintenance asks of a store's files, beside readers and writers: what is in them, whether every check holds,
// whether some process still writes them. What cannot be read is a std::runtime_error that names the path and the
// cause.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "store/format/compression.h"
#include "store/format/segment.h"

namespace torchcache::store {

// Throws unless the error is 0.
void must(Error error, const std::string& what, const std::string& path);

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
  uint64_t bytes = 0;   // uncompressed
  uint64_t stored = 0;  // as they are in the file
};

struct Summary {
  bool idle = false;
  uint64_t bytes = 0;
  uint64_t index_bytes = 0;  // 0: no index, or none that is right
  uint64_t blocks = 0;
  std::vector<RowGroup> groups;
};

// From the index, and from the tables of what it does not cover.
Summary summarize(const std::string& directory, const SegmentId& id);

// Walks over the blocks of a segment like a Scanner, but bytes that are there and cannot be read are an error: they
// must not be taken for damage, nor for the end.
class Walk {
 public:
  Walk(const std::string& directory, const SegmentId& id, uint64_t position = kHeaderBytes);

  bool next();
  const BlockHeader& header() const { return scanner_.header(); }
  Table table() const { return split_table(scanner_.header(), scanner_.table()); }
  std::string layout() const;
  Digest key(uint32_t row) const { return from_canonical(table().keys + 16 * uint64_t{row}); }

  const std::vector<Hole>& holes() const { return scanner_.holes(); }
  uint64_t position() const { return scanner_.position(); }
  uint64_t bytes() const { return bytes_; }  // of the file, when the walk began
  const File& file() const { return *file_; }
  const std::string& path() const { return path_; }

 private:
  void check_end() const;

  const std::string path_;
  const SegmentId id_;
  const std::shared_ptr<File> file_;
  const uint64_t bytes_;
  Scanner scanner_;
};

// A row as it stands in the file.
struct StoredRow {
  uint32_t row;  // of its block
  uint64_t offset;
  const uint8_t* data;
  uint64_t length;
  Digest key;
  uint64_t check;
  bool right;  // what a reader would take
};

// The rows of the block at which a walk stands, read about 1 MiB at a time.
class BlockRows {
 public:
  explicit BlockRows(const Walk& walk);
  bool next(StoredRow* row);  // its data is valid until the next call

 private:
  uint64_t length(uint32_t row) const;
  void read_some();
  bool is_right(const StoredRow& row);

  const Walk& walk_;
  const BlockHeader header_;
  const Table table_;
  uint32_t row_ = 0, end_ = 0;  // the rows that were read: [row_, end_)
  uint64_t offset_;             // of row_, in the segment
  std::vector<uint8_t> bytes_, scratch_;
  size_t used_ = 0;  // bytes before row_
};

struct Damage {
  enum Kind : int64_t { kSegmentHeader, kBlocks, kRows, kIndex, kCut };
  Kind kind;
  uint64_t offset;
  uint64_t bytes;
  uint64_t rows;  // 0 where it cannot be known
};

// Checks a segment in parts.
struct Verified {
  uint64_t position = kHeaderBytes;  // where the next part begins
  bool done = false;
  uint64_t rows = 0;
  std::vector<Damage> damage;
};
// About `bytes` of the segment from `position` on. With the first part its header is checked, with the last its index.
// What a live or killed writer did not finish is no damage.
Verified verify(const std::string& directory, const SegmentId& id, uint64_t position, uint64_t bytes);

// Keys and their layouts. Takes up to 64 bytes of memory a row while it grows.
class RowSet {
 public:
  bool insert(const Digest& key, const Digest& layout);  // false if it was there
  bool has(const Digest& key, const Digest& layout) const;

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
