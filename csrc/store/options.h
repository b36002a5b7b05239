// What a store is opened with, and what crosses its facade.
#pragma once

#include <cstdint>
#include <string>

namespace torchcache::store {

struct Options {
  std::string directory;   // need not exist before the first write
  uint64_t max_bytes = 0;  // bytes of files that this process may write
  bool zstd = false;
  int zstd_level = 3;
  int zstd_threads = 1;
  bool mmap = false;                          // copy rows from mappings of the segments
  uint64_t queue_bytes = 64 << 20;            // rows that may wait to be written
  uint64_t rotate_bytes = uint64_t{1} << 30;  // a block that would pass this begins a new segment; not more than that
  double retry_seconds = 5;                   // between attempts to write to a disk that is full
  double patience_seconds = 10;               // without progress, before rows are dropped
};

// n rows of one output leaf, contiguous: row i at data + i * row_bytes.
struct Leaf {
  uint8_t* data;
  uint64_t row_bytes;
};

struct ConstLeaf {
  const uint8_t* data;
  uint64_t row_bytes;
};

struct Stats {
  uint64_t rows = 0;           // distinct keys that can be found, queued ones too
  uint64_t bytes_written = 0;  // of files of this process, as they will be when all is written
  uint64_t queued_rows = 0;
  uint64_t queued_bytes = 0;
  uint64_t damaged_rows = 0;  // dropped since they did not verify; an unreadable range counts once
  uint64_t dropped_rows = 0;  // not written since nothing could be written
  bool full = false;          // max_bytes did not admit all rows
};

// What a caller should look at next.
struct Alerts {
  bool warnings = false;  // there are some to be drained
  bool full = false;      // as in Stats
};

}  // namespace torchcache::store
