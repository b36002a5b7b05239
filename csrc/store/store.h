// The persistent tier of one directory: rows by key, shared by any number of processes.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "core/fork.h"
#include "hash/digest.h"
#include "store/options.h"

namespace torchcache::store {

using hash::Digest;

struct State;
class Writer;

// All functions are thread-safe and may be called in any order; none throws for what is wrong with
// files: that is a miss, a count and a warning. After a fork the parent's store goes on; the
// child's has the same rows, an empty queue and a segment of its own once it writes something.
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

  // Which rows of one layout are here, in files or in the queue: present[i] = 1 or 0. The layout is
  // the wanted one, or, if that is "", that of the first row that is here. Returns it, or "" if no
  // row is here.
  std::string lookup(const Digest* keys, size_t n, uint8_t* present, const std::string& wanted = "");

  // Copies rows of that layout into out, verified: ok[i] = 1, or 0 and the row is unspecified.
  void read(const Digest* keys, size_t n, const std::string& layout, const std::vector<Leaf>& out, uint8_t* ok);

  // Queues copies of the rows; those that are here already count as written. How many of the first
  // rows max_bytes admitted: no row after one that does not fit is written. Waits while the queue is
  // full, at most patience_seconds without progress.
  size_t write(const Digest* keys, size_t n, const std::string& layout, const std::vector<ConstLeaf>& rows);

  // Returns when all that is queued is written or given up; on network file systems also synced.
  void flush();
  // Flushes, writes the index of the own segment, closes all files. Later calls find nothing
  // and write nothing.
  void close();

  Stats stats() const;
  Alerts alerts() const;
  // What went wrong since the last call, with cause and directory; each thing once in a lifetime.
  std::vector<std::string> drain_warnings();

 private:
  using Lock = std::unique_lock<std::mutex>;
  struct Chunk;  // rows of one write that are queued together
  explicit Store(const Options& options);

  size_t find_missing(const Digest* keys, size_t n, uint8_t* present, uint32_t* layout) const;
  size_t write_chunk(const Chunk& chunk);
  std::vector<size_t> new_rows(const Chunk& chunk) const;
  size_t admit_new_rows(const Chunk& chunk, std::vector<size_t>* rows, uint64_t* row_cost);
  bool start_writer();
  void enqueue(const Chunk& chunk, const std::vector<size_t>& rows, uint64_t row_cost, Lock& lock);
  void drop(uint64_t rows);
  void before_fork();
  void after_fork(bool child);
  void become_child();

  const std::shared_ptr<State> state_;
  std::shared_ptr<Writer> writer_;                    // guarded by the mutex; null before the first write
  std::chrono::steady_clock::time_point next_start_;  // of a writer, after one could not be started
  core::AtFork at_fork_{[this] { before_fork(); }, [this](bool child) { after_fork(child); }};
};

}  // namespace torchcache::store
