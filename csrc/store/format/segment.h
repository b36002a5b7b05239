// One segment: finding its blocks, and writing new ones.
#pragma once

#include <sys/uio.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "store/format/format.h"
#include "store/os/file.h"

namespace torchcache::store {

// A range of a segment in which no block was found.
struct Hole {
  uint64_t begin;
  uint64_t end;
};

// Walks over the blocks of a segment. Used by one thread; the file must outlive it.
class Scanner {
 public:
  // Reads no byte from `end` on. `position` is a multiple of 64.
  Scanner(const File& file, const SegmentId& id, uint64_t position, uint64_t end);

  // Goes to the next whole block with a right header and a right table. False at the end, at a
  // block that is not there to its end yet, and where the file cannot be read.
  bool next();

  const BlockHeader& header() const { return header_; }
  const uint8_t* table() const { return table_.data(); }  // valid until next()

  // Where a later scan goes on.
  uint64_t position() const { return position_; }
  // What was skipped, apart from each other, in order.
  const std::vector<Hole>& holes() const { return holes_; }

 private:
  enum class Step { kBlock, kNoBlock, kEnd };
  Step read_block(uint64_t position);
  uint64_t next_header(uint64_t position);
  void skip_to(uint64_t end);

  const File& file_;
  const SegmentId id_;
  uint64_t position_;
  const uint64_t end_;
  BlockHeader header_;
  std::vector<uint8_t> table_;
  std::vector<Hole> holes_;
};

// Rows of one layout and codec, ready to be written.
struct NewBlock {
  Codec codec = Codec::kRaw;
  std::string layout;
  uint64_t row_bytes = 0;
  std::vector<Digest> keys;
  std::vector<uint64_t> checks;
  std::vector<uint32_t> lengths;  // as stored; for zstd only
  std::vector<iovec> payload;     // not owned; together payload_bytes
  uint64_t payload_bytes = 0;

  uint64_t bytes() const;  // in the file, with header and padding
};

// The segment that this process writes. Used by one thread at a time.
class SegmentWriter {
 public:
  // Null and an error if the file cannot be made.
  static std::unique_ptr<SegmentWriter> create(const std::string& directory, Error* error);

  // Writes the block at end(). After an error the file is cut back to where it was.
  Error append(const NewBlock& block, BlockHeader* header);

  const SegmentId& id() const { return id_; }
  uint64_t end() const { return end_; }
  bool deleted() const;  // whether the file lost its name
  const std::shared_ptr<File>& file() const { return file_; }

 private:
  SegmentWriter(const SegmentId& id, std::shared_ptr<File> file) : id_(id), file_(std::move(file)) {}

  const SegmentId id_;
  const std::shared_ptr<File> file_;
  uint64_t end_ = kHeaderBytes;
};

}  // namespace torchcache::store
