// The thread that writes what is queued, and the segment it writes to.
#pragma once

#include <condition_variable>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

#include "store/format/compression.h"
#include "store/format/segment.h"
#include "store/state.h"

namespace torchcache::store {

// Lives on the heap, held by the store and by its own thread. A forked child, which has the object
// but not the thread, must neither use nor destroy it: condition variables remember who waits.
//
// Public functions are called with the store's mutex held; those that take the lock release it
// while they wait.
class Writer : public std::enable_shared_from_this<Writer> {
 public:
  using Lock = std::unique_lock<std::mutex>;

  // Makes the directory and a segment and starts the thread. Null and an error if it cannot.
  static std::shared_ptr<Writer> start(std::shared_ptr<State> state, Error* error);

  // Queues a batch.
  void push(std::shared_ptr<const Batch> batch);
  // A write gave up the room that it had waited for.
  void wake_waiting() { progress_.notify_all(); }

  // Whether so many bytes fit into the queue.
  bool has_room(uint64_t bytes) const;
  // Waits until they do. False if nothing was written for too long.
  bool wait_for_room(Lock& lock, uint64_t bytes);
  // Waits until the queue is empty. False if nothing was written for too long.
  bool wait_until_empty(Lock& lock);
  // Writes the index of the own segment and ends the thread. The queue is empty.
  void stop(Lock& lock);

  // The own segment, open for writing. Null while there is none.
  const std::shared_ptr<File>& file() const { return file_; }

 private:
  struct Work {
    std::vector<Slice> slices;
    std::string layout;
    uint64_t rows = 0;
    uint64_t bytes = 0;
  };

  explicit Writer(std::shared_ptr<State> state);

  // With the mutex held.
  void adopt(std::unique_ptr<SegmentWriter> segment);
  void leave_segment(bool gone);
  void run(Lock& lock);
  Work next_work() const;
  void record(const Work& work, const NewBlock& block, const BlockHeader& header);
  void count_own_bytes();
  bool stalled() const;
  bool wait(Lock& lock);

  // Without it.
  Error write(const Work& work);
  NewBlock assemble(const Work& work, CompressedRows* compressed);
  Error prepare_segment(uint64_t block_bytes);
  Error new_segment();
  void seal();

  const std::shared_ptr<State> state_;
  std::condition_variable work_;      // something is queued, or stop_
  std::condition_variable progress_;  // something was written, or given up, or ended_
  std::thread thread_;

  // Guarded by the mutex.
  bool stop_ = false;
  bool ended_ = false;
  Clock::time_point last_progress_;  // or when the queue was last empty
  std::shared_ptr<File> file_;
  uint32_t number_ = 0;  // of the own segment among all
  uint64_t sealed_bytes_ = 0, rows_ = 0, blocks_ = 0, layout_bytes_ = 0;
  std::set<uint32_t> layouts_;  // in the own segment

  // The thread's own, once it runs.
  std::unique_ptr<SegmentWriter> segment_;
  Compressor compressor_;
  uint64_t block_bytes_;  // how large a block may be: less after an error
};

}  // namespace torchcache::store
