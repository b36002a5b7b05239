// Blocks and rows of a segment one after another, for maintenance: what cannot be read is a std::runtime_error that
// names the path and the cause.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "store/format/segment.h"
#include "store/os/file.h"

namespace torchcache::store {

// Throws unless the error is 0.
void throw_on_error(Error error, const std::string& what, const std::string& path);

// Walks over the blocks of a segment like a Scanner, but bytes that are there and cannot be read are an error: they
// must not count as damage, nor as the end.
class BlockCursor {
 public:
  BlockCursor(const std::string& directory, const SegmentId& id, uint64_t position = kHeaderBytes);

  bool next();
  const BlockHeader& header() const { return scanner_.header(); }
  Table table() const { return split_table(scanner_.header(), scanner_.table()); }
  std::string layout() const { return layout_of(scanner_.header(), scanner_.table()); }
  Digest key(uint32_t row) const { return table().key(row); }

  const std::vector<Hole>& holes() const { return scanner_.holes(); }
  uint64_t position() const { return scanner_.position(); }
  uint64_t bytes() const { return bytes_; }  // of the file, when the cursor was made
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
  bool valid;  // a reader would accept it
};

// The rows of the block at which a BlockCursor stands, read about 1 MiB at a time.
class RowCursor {
 public:
  explicit RowCursor(const BlockCursor& blocks);
  bool next(StoredRow* row);  // its data is valid until the next call

 private:
  uint64_t length(uint32_t row) const;
  void read_next();
  bool is_valid(const StoredRow& row);

  const BlockCursor& blocks_;
  const BlockHeader header_;
  const Table table_;
  uint32_t row_ = 0, end_ = 0;  // the rows that were read: [row_, end_)
  uint64_t offset_;             // of row_, in the segment
  std::vector<uint8_t> bytes_, scratch_;
  size_t used_ = 0;  // bytes before row_
};

}  // namespace torchcache::store
