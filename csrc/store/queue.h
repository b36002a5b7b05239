// Rows that wait to be written. They can be found and read until the writer is done with them.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <memory_resource>
#include <unordered_map>
#include <vector>

#include "store/buffers.h"
#include "store/format/format.h"

namespace torchcache::store {

// Rows of one put, copied. Never altered once it is in the queue, so it may be read without a lock.
struct Batch {
  uint32_t layout = 0;  // number given by Index::intern
  uint64_t row_bytes = 0;
  uint64_t row_cost = 0;  // estimated bytes of files for each row
  std::vector<Digest> keys;
  RowBuffers::Buffer rows;

  const uint8_t* row(size_t i) const { return rows.get() + i * row_bytes; }
};

// Some neighbouring rows of a batch.
struct Slice {
  std::shared_ptr<const Batch> batch;
  size_t first = 0;
  size_t count = 0;
};

// Not thread-safe: guarded by the store's mutex.
class Queue {
 public:
  struct Row {
    std::shared_ptr<const Batch> batch;  // null if not found
    size_t row = 0;
  };

  bool empty() const { return batches_.empty(); }
  uint64_t rows() const { return rows_; }
  uint64_t bytes() const { return bytes_; }  // of rows
  uint64_t cost() const { return cost_; }    // sum of row_cost

  Row find(const Digest& key) const;
  void push(std::shared_ptr<const Batch> batch);

  // The oldest rows, of one layout and size: as many as fit into `bytes`, at least one, at most
  // `rows`. They stay in the queue.
  std::vector<Slice> front(uint64_t bytes, uint64_t rows) const;
  // Drops what front() gave, as far as it is still here.
  void pop(const std::vector<Slice>& slices);
  void clear();

 private:
  struct KeyHash {
    size_t operator()(const Digest& key) const { return key.low; }
  };
  void drop(const Batch& batch, size_t first, size_t count);

  std::deque<std::shared_ptr<const Batch>> batches_;
  size_t popped_ = 0;  // rows of the first batch that are gone
  // Nodes come and go with every row: the pool makes them cheap.
  std::pmr::unsynchronized_pool_resource nodes_;
  std::pmr::unordered_map<Digest, std::pair<const std::shared_ptr<const Batch>*, size_t>, KeyHash> rows_by_key_{
      &nodes_};
  uint64_t rows_ = 0;
  uint64_t bytes_ = 0;
  uint64_t cost_ = 0;
};

}  // namespace torchcache::store
