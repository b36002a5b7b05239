// What the threads of one store share: one mutex, and everything that it guards.
//
// The mutex is held for looking things up, never while a file is read or written (with one
// exception: the first put creates its segment under it), so a fork may wait for it.
#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "store/file.h"
#include "store/index.h"
#include "store/queue.h"
#include "store/segment.h"

namespace torchcache::store {

using Clock = std::chrono::steady_clock;

struct Options {
  std::string directory;   // need not exist before the first put
  uint64_t max_bytes = 0;  // bytes of files that this process may write
  bool zstd = false;
  int zstd_level = 3;
  int zstd_threads = 1;
  bool mmap = false;                     // copy rows from mappings of the segments
  uint64_t queue_bytes = 64 << 20;       // rows that may wait to be written
  uint64_t rotate_bytes = kRotateBytes;  // a block that would pass this begins a new segment
  double retry_seconds = 5;              // between attempts to write to a disk that is full
  double patience_seconds = 10;          // without progress, before rows are dropped
};

inline Clock::duration seconds(double value) {
  return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(value));
}

// A segment of the directory, whoever writes it.
struct Segment {
  SegmentId id{};
  bool own = false;                  // written by this process now: its rows come from the writer, not from a scan
  bool gone = false;                 // no longer in the directory
  bool scanned = false;              // looked at, at least once
  bool sealed = false;               // has an index: it is not expected to grow
  uint64_t position = kHeaderBytes;  // where the next scan begins
  std::vector<Hole> holes;           // damage, or bytes that cannot be seen yet
  FileState seen;                    // when it was scanned
  Clock::time_point changed;         // when `seen` was last found to be different
  std::shared_ptr<File> file;        // while it is among the open ones
  uint64_t used = 0;                 // State::uses when the file was last asked for
};

struct State {
  explicit State(Options o) : options(std::move(o)), buffers(options.queue_bytes / 4) {}

  const Options options;  // the directory is absolute
  RowBuffers buffers;     // has its own mutex, which may be taken under the one below

  std::mutex mutex;  // guards all below
  Index index;
  std::vector<Segment> segments;          // only grows: the numbers of segments stay what they are
  std::map<SegmentId, uint32_t> numbers;  // of those that are not gone
  Queue queue;
  bool closing = false;  // nothing new is kept
  bool closed = false;   // nothing is found any more

  bool looking = false;  // some thread is in look()
  uint32_t looks = 0;
  Clock::time_point next_look;
  uint64_t uses = 0;
  // Where the stored rows of a zstd block end, counted from its payload; read when first needed.
  std::unordered_map<uint32_t, std::shared_ptr<const std::vector<uint32_t>>> row_ends;
  size_t open_files = 0;

  uint64_t own_bytes = 0;      // of files that this process wrote
  uint64_t pending_bytes = 0;  // rows of puts that are being copied: not in the queue yet
  uint64_t pending_cost = 0;
  uint64_t damaged_rows = 0;
  uint64_t dropped_rows = 0;
  bool full = false;

  std::set<std::string> warned;
  std::vector<std::string> warnings;

  // Each text is given out once.
  void warn(const std::string& text) {
    if (warned.size() < 100 && warned.insert(text).second) warnings.push_back(text);
  }
  void warn(const std::string& what, Error error) { warn(what + " " + options.directory + ": " + error_text(error)); }
  void warn_of_damage(const Segment& segment) {
    warn("damaged rows in " + segment_path(options.directory, segment.id) +
         " are left out: they will be computed again");
  }
};

// Adds a segment and returns its number. The caller holds the mutex.
uint32_t add_segment(State& state, const SegmentId& id);
// Forgets a segment that is no longer in the directory. The caller holds the mutex.
void remove_segment(State& state, uint32_t number);
// The open file of a segment; at most 128 stay open. Takes the mutex; the caller must not hold it.
std::shared_ptr<File> segment_file(State& state, uint32_t segment, Error* error);
// The file of this segment is asked for by its name again, the next time. The caller holds the
// mutex.
void forget_file(State& state, Segment& segment);

}  // namespace torchcache::store
