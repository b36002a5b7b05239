// What the threads of one store share: one mutex, and everything that it guards.
//
// The mutex is held for looking things up, never while a file is read or written (with one
// exception: the first write creates its segment under it), so a fork may wait for it.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "store/index.h"
#include "store/options.h"
#include "store/queue.h"
#include "store/registry.h"

namespace torchcache::store {

inline Clock::duration seconds(double value) {
  return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(value));
}

struct State {
  explicit State(Options o) : options(std::move(o)), buffers(options.queue_bytes / 4) {}

  const Options options;  // the directory is absolute
  RowBuffers buffers;     // has its own mutex, which may be taken under the one below

  std::mutex mutex;  // guards all below
  Index index;
  SegmentRegistry segments;
  Queue queue;
  bool closing = false;  // nothing new is written
  bool closed = false;   // nothing is found any more

  bool refreshing = false;  // some thread is in refresh()
  uint32_t refreshes = 0;
  Clock::time_point next_refresh;
  // Where the stored rows of a zstd block end, counted from its payload; read when first needed.
  std::unordered_map<uint32_t, std::shared_ptr<const std::vector<uint32_t>>> row_ends;

  uint64_t own_bytes = 0;      // of files that this process wrote
  uint64_t pending_bytes = 0;  // rows that are being copied: not in the queue yet
  uint64_t pending_cost = 0;
  uint64_t damaged_rows = 0;
  uint64_t dropped_rows = 0;
  bool full = false;

  std::set<std::string> warned;
  std::vector<std::string> warnings;

  // Of files of this process when all is written: what max_bytes limits.
  uint64_t committed_bytes() const { return own_bytes + queue.cost() + pending_cost; }

  // Each text is given out once.
  void warn(const std::string& text);
  void warn(const std::string& what, Error error);
  void warn_of_damage(const Segment& segment);
  // The segment is no longer in the directory.
  void remove_segment(uint32_t number);
};

// The open file of a segment. Takes the mutex; the caller must not hold it.
std::shared_ptr<File> open_segment_file(State& state, uint32_t segment, Error* error);

}  // namespace torchcache::store
