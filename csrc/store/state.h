// What the threads of one store share: one mutex, and everything that it guards.
//
// The mutex is held for looking things up, never while a file is read or written (with one
// exception: the first write creates its segment under it), so a fork may wait for it.
#pragma once

#include <cstdint>
#include <memory>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "core/mutex.h"
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
  RowBuffers buffers;     // has its own mutex, which may be locked under the one below

  core::Mutex mutex;
  Index index TORCHCACHE_GUARDED_BY(mutex);
  SegmentRegistry segments TORCHCACHE_GUARDED_BY(mutex);
  Queue queue TORCHCACHE_GUARDED_BY(mutex);
  bool closing TORCHCACHE_GUARDED_BY(mutex) = false;  // nothing new is written
  bool closed TORCHCACHE_GUARDED_BY(mutex) = false;   // nothing is found any more

  bool refreshing TORCHCACHE_GUARDED_BY(mutex) = false;  // some thread is in refresh()
  uint32_t refreshes TORCHCACHE_GUARDED_BY(mutex) = 0;
  Clock::time_point next_refresh TORCHCACHE_GUARDED_BY(mutex);
  // Where the stored rows of a zstd block end, counted from its payload; read when first needed.
  std::unordered_map<uint32_t, std::shared_ptr<const std::vector<uint32_t>>> row_ends TORCHCACHE_GUARDED_BY(mutex);

  uint64_t own_bytes TORCHCACHE_GUARDED_BY(mutex) = 0;      // of files that this process wrote
  uint64_t pending_bytes TORCHCACHE_GUARDED_BY(mutex) = 0;  // rows that are being copied: not in the queue yet
  uint64_t pending_cost TORCHCACHE_GUARDED_BY(mutex) = 0;
  uint64_t damaged_rows TORCHCACHE_GUARDED_BY(mutex) = 0;
  uint64_t dropped_rows TORCHCACHE_GUARDED_BY(mutex) = 0;
  bool full TORCHCACHE_GUARDED_BY(mutex) = false;

  std::set<std::string> warned TORCHCACHE_GUARDED_BY(mutex);
  std::vector<std::string> warnings TORCHCACHE_GUARDED_BY(mutex);

  // Of files of this process when all is written: what max_bytes limits.
  uint64_t committed_bytes() const TORCHCACHE_REQUIRES(mutex) { return own_bytes + queue.cost() + pending_cost; }

  // Each text is given out once.
  void warn(const std::string& text) TORCHCACHE_REQUIRES(mutex);
  void warn(const std::string& what, Error error) TORCHCACHE_REQUIRES(mutex);
  void warn_of_damage(const Segment& segment) TORCHCACHE_REQUIRES(mutex);
  // The segment is no longer in the directory.
  void remove_segment(uint32_t number) TORCHCACHE_REQUIRES(mutex);
};

// The open file of a segment.
std::shared_ptr<File> open_segment_file(State& state, uint32_t segment, Error* error) TORCHCACHE_EXCLUDES(state.mutex);

}  // namespace torchcache::store
