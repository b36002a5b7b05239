// The thread that writes what is queued, and the segment it writes to.
#pragma once

#include <memory>
#include <set>
#include <thread>
#include <vector>

#include "core/mutex.h"
#include "store/format/compression.h"
#include "store/format/segment.h"
#include "store/state.h"

namespace torchcache::store {

// Lives on the heap, held by the store and by its own thread. A forked child, which has the object
// but not the thread, must neither use nor destroy it: condition variables remember who waits.
//
// The caller of a public function holds the store's mutex; functions that wait release it meanwhile.
class Writer : public std::enable_shared_from_this<Writer> {
 public:
  // Makes the directory and a segment and starts the thread. Null and an error if it cannot.
  static std::shared_ptr<Writer> start(const std::shared_ptr<State>& state, Error* error)
      TORCHCACHE_REQUIRES(state->mutex);

  // Queues a batch.
  void push(std::shared_ptr<const Batch> batch);
  // A write gave up the room that it had waited for.
  void wake_waiting() { progress_.notify_all(); }

  // Whether so many bytes fit into the queue.
  bool has_room(uint64_t bytes) const;
  // Waits until they do. False if nothing was written for too long.
  bool wait_for_room(uint64_t bytes);
  // Waits until the queue is empty. False if nothing was written for too long.
  bool wait_until_empty();
  // Writes the index of the own segment and ends the thread. The queue is empty.
  void stop();

  // The own segment, open for writing. Null while there is none.
  std::shared_ptr<File> file() const;

 private:
  struct Work {
    std::vector<Slice> slices;
    std::string layout;
    uint64_t rows = 0;
    uint64_t bytes = 0;
  };

  explicit Writer(std::shared_ptr<State> state);

  void adopt(std::unique_ptr<SegmentWriter> segment) TORCHCACHE_REQUIRES(state_->mutex);
  void leave_segment(bool gone) TORCHCACHE_REQUIRES(state_->mutex);
  void run() TORCHCACHE_REQUIRES(state_->mutex);
  bool write_next() TORCHCACHE_REQUIRES(state_->mutex);
  Work next_work() const TORCHCACHE_REQUIRES(state_->mutex);
  void record(const Work& work, const NewBlock& block, const BlockHeader& header) TORCHCACHE_REQUIRES(state_->mutex);
  void count_own_bytes() TORCHCACHE_REQUIRES(state_->mutex);
  bool is_stalled() const TORCHCACHE_REQUIRES(state_->mutex);
  bool wait_for_progress() TORCHCACHE_REQUIRES(state_->mutex);

  Error write(const Work& work) TORCHCACHE_EXCLUDES(state_->mutex);
  NewBlock assemble(const Work& work, CompressedRows* compressed);
  Error prepare_segment(uint64_t block_bytes) TORCHCACHE_EXCLUDES(state_->mutex);
  Error new_segment() TORCHCACHE_EXCLUDES(state_->mutex);
  void seal() TORCHCACHE_EXCLUDES(state_->mutex);

  const std::shared_ptr<State> state_;
  core::Condition work_;      // something is queued, or stop_
  core::Condition progress_;  // something was written, or given up, or ended_
  std::thread thread_;

  bool stop_ TORCHCACHE_GUARDED_BY(state_->mutex) = false;
  bool ended_ TORCHCACHE_GUARDED_BY(state_->mutex) = false;
  Clock::time_point last_progress_ TORCHCACHE_GUARDED_BY(state_->mutex);  // or when the queue was last empty
  std::shared_ptr<File> file_ TORCHCACHE_GUARDED_BY(state_->mutex);

  // The thread's own, once it runs.
  uint32_t number_ = 0;  // of the own segment among all
  uint64_t sealed_bytes_ = 0, rows_ = 0, blocks_ = 0, layout_bytes_ = 0;
  std::set<uint32_t> layouts_;  // in the own segment
  std::unique_ptr<SegmentWriter> segment_;
  Compressor compressor_;
  uint64_t block_bytes_;  // how large a block may be: less after an error
};

}  // namespace torchcache::store
