// Many segments into few, without duplicates and damage, while others read and write.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "store/maintenance/inspect.h"

namespace torchcache::store {

// Copies the rows of finished segments into new ones. A new segment is written in a folder of its own, put on disk, and
// renamed into place with its index; only then are the old ones removed whose rows it has. So a kill at any moment
// leaves every row, some of them twice, and a folder *.tmp. Errors are std::runtime_error; the old segments then stay.
class Compaction {
 public:
  struct Counts {
    uint64_t rows = 0;        // copied
    uint64_t duplicates = 0;  // left out
    uint64_t damaged = 0;     // rows left out, and ranges that hold no block
    uint64_t removed = 0;     // segments
    uint64_t written = 0;     // segments
  };

  explicit Compaction(std::string directory) : directory_(std::move(directory)) {}
  ~Compaction();
  Compaction(const Compaction&) = delete;
  Compaction& operator=(const Compaction&) = delete;

  // A segment that stays as it is: its rows are not copied from others.
  void retain(const SegmentId& id);
  // Copies a segment. False, and nothing is done, if some process may still write it.
  bool add_segment(const SegmentId& id);
  // Puts what is left into place.
  void finish();

  const Counts& counts() const { return counts_; }

 private:
  struct Pending {
    NewBlock block;
    std::vector<uint8_t> rows;
  };
  using RowFormat = std::tuple<std::string, uint64_t, Codec>;  // layout, bytes of a row, codec

  void add_row(const RowFormat& format, const StoredRow& row);
  bool is_full(uint64_t more) const;
  void write(const RowFormat& format, Pending* pending);
  void write_all();
  void publish();
  void seal();
  void remove_old();

  const std::string directory_;
  const std::string work_ = directory_ + "/" + to_hex(random_id()) + ".tmp";
  RowSet seen_;
  std::map<RowFormat, Pending> pending_;
  uint64_t pending_bytes_ = 0;  // in the file, at most
  std::unique_ptr<SegmentWriter> segment_;
  int64_t modified_ = 0;                                // when the segment that is being copied was last written
  int64_t newest_ = 0;                                  // of rows that are copied but not in place
  std::vector<std::pair<SegmentId, uint64_t>> copied_;  // and their sizes; still there
  Counts counts_;
};

}  // namespace torchcache::store
