// The persistent tier of one directory: rows by key, shared by any number of processes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "hash/digest.h"
#include "store/options.h"

namespace torchcache::store {

using hash::Digest;

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
  virtual ~Store() = default;  // closes it
  Store(const Store&) = delete;
  Store& operator=(const Store&) = delete;

  // Which rows of one layout are here, in files or in the queue: present[i] = 1 or 0. The layout is
  // the wanted one, or, if that is "", that of the first row that is here. Returns it, or "" if no
  // row is here.
  virtual std::string lookup(const Digest* keys, size_t n, uint8_t* present, const std::string& wanted = "") = 0;

  // Copies rows of that layout into out, verified: ok[i] = 1, or 0 and the row is unspecified.
  virtual void read(const Digest* keys, size_t n, const std::string& layout, const std::vector<Leaf>& out,
                    uint8_t* ok) = 0;

  // Queues copies of the rows; those that are here already count as written. How many of the first
  // rows max_bytes admitted: no row after one that does not fit is written. Waits while the queue is
  // full, at most patience_seconds without progress.
  virtual size_t write(const Digest* keys, size_t n, const std::string& layout, const std::vector<ConstLeaf>& rows) = 0;

  // Returns when all that is queued is written or given up; on network file systems also synced.
  virtual void flush() = 0;
  // Flushes, writes the index of the own segment, closes all files. Later calls find nothing
  // and write nothing.
  virtual void close() = 0;

  virtual Stats stats() const = 0;
  virtual Alerts alerts() const = 0;
  // What went wrong since the last call, with cause and directory; each thing once in a lifetime.
  virtual std::vector<std::string> drain_warnings() = 0;

 protected:
  Store() = default;
};

}  // namespace torchcache::store
