// The persistent tier of one directory: rows by key, shared by any number of processes.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "fork.h"
#include "hash/digest.h"
#include "store/read.h"
#include "store/state.h"

namespace torchcache::store {

struct ConstLeaf {  // as Leaf
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
  bool full = false;          // max_bytes kept rows out
};

class Writer;

// All functions are thread-safe and may be called in any order; none throws for what is wrong with
// files: that is a miss, a count and a warning. After a fork the parent's store goes on; the
// child's has the same rows, an empty queue and a segment of its own once it puts something.
//
// A row is the concatenation of its leaves' bytes. A layout is an opaque text of at most 64 KiB.
class Store {
 public:
  // A directory that is missing or cannot be read is an empty store. std::invalid_argument for bad
  // options only.
  static std::shared_ptr<Store> open(const Options& options);
  ~Store();
  Store(const Store&) = delete;
  Store& operator=(const Store&) = delete;

  // Which rows are here, in files or in the queue: present[i] = 1 or 0. The layout of the first
  // that is, "" if none is; rows of other layouts count as absent.
  std::string find(const Digest* keys, size_t n, uint8_t* present);

  // Copies rows of that layout into out, verified: ok[i] = 1, or 0 and the row is unspecified.
  void read(const Digest* keys, size_t n, const std::string& layout, const std::vector<Leaf>& out, uint8_t* ok);

  // Queues copies of the rows; those that are here already count as kept. How many of the first
  // rows max_bytes admitted: no row after one that does not fit is kept. Waits while the queue is
  // full, at most patience_seconds without progress.
  size_t put(const Digest* keys, size_t n, const std::string& layout, const std::vector<ConstLeaf>& rows);

  // Returns when all that is queued is written or given up; on network file systems also synced.
  void flush();
  // Flushes, writes the index of the own segment, lets go of everything. Later calls find nothing
  // and keep nothing.
  void close();

  Stats stats() const;
  // What went wrong since the last call, with cause and directory; each thing once in a lifetime.
  std::vector<std::string> take_warnings();

 private:
  using Lock = std::unique_lock<std::mutex>;
  struct Chunk;  // rows of one put that are queued together
  explicit Store(const Options& options);

  size_t find_missing(const Digest* keys, size_t n, uint8_t* present, uint32_t* layout) const;
  size_t put_chunk(const Chunk& chunk);
  size_t admit(const Chunk& chunk, std::vector<size_t>* rows, uint64_t* row_cost);
  bool has_writer();
  void enqueue(const Chunk& chunk, const std::vector<size_t>& rows, uint64_t row_cost, Lock& lock);
  void drop(uint64_t rows);
  void before_fork();
  void after_fork(bool child);
  void become_child();

  const std::shared_ptr<State> state_;
  std::shared_ptr<Writer> writer_;  // guarded by the mutex; null before the first put
  Clock::time_point next_start_;    // of a writer, after one could not be started
  AtFork at_fork_{[this] { before_fork(); }, [this](bool child) { after_fork(child); }};
};

}  // namespace torchcache::store
