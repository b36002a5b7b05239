// The arenas of the memory tier: the tensors in which rows lie.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/fork.h"
#include "core/mutex.h"
#include "core/tensors.h"

namespace torchcache::memory {

// The rows of one leaf: chunks [rows, …], the first one from slot 0 on.
class Arena {
 public:
  using Tensor = torch::stable::Tensor;

  // std::invalid_argument for a tensor that is not contiguous.
  explicit Arena(const Tensor& chunk);

  // A chunk whose first row has the slot behind the last one; the last chunk once more changes nothing.
  void add(int64_t first, const Tensor& chunk);

  // Whether this library can read there.
  bool is_readable() const;

  // The rows of these slots as a fresh tensor [n, …] on the device of the chunks; on the CPU in pinned memory if
  // wanted.
  Tensor gather(const int64_t* slots, int64_t n, bool pinned) const;

  // Whether `write` can copy rows of such a tensor to the slots first, …, first + n - 1: both are on the CPU, and these
  // slots lie in one chunk.
  bool is_writable(const Tensor& rows, int64_t first, int64_t n) const;

  // Copies rows of a tensor, those at these positions, to the slots from `first` on.
  void write(const Tensor& rows, const std::vector<int64_t>& positions, int64_t first) const;

 private:
  struct Chunk {
    int64_t first;  // slot
    int64_t count;  // rows
    uint8_t* rows;
    Tensor owner;
  };

  const Chunk& chunk_of(int64_t slot) const;
  const uint8_t* row(int64_t slot) const;

  std::vector<Chunk> chunks_;
  int32_t device_;  // see device_of
  core::RowShape shape_;
};

// Layout → one arena for each leaf. Thread-safe. A row must not be written any more once its slot can be looked up.
class Arenas {
 public:
  using Tensor = torch::stable::Tensor;

  // The rows of a layout from slot `first` on: one tensor for each leaf.
  void add(int64_t layout, int64_t first, const std::vector<Tensor>& leaves);

  // The rows of these slots as fresh leaves [n, …], see Arena; no leaves for a layout that is unknown or not readable.
  std::vector<Tensor> gather(int64_t layout, const int64_t* slots, size_t n, bool pinned) const;

  // Copies the rows at these positions of leaves to the slots from `first` on; false, and nothing is copied, where one
  // of them cannot be written by Arena::write.
  bool write(int64_t layout, int64_t first, const std::vector<Tensor>& leaves,
             const std::vector<int64_t>& positions) const;

 private:
  using Leaves = std::vector<Arena>;

  std::shared_ptr<const Leaves> of(int64_t layout) const;

  mutable core::Mutex mutex_;
  std::vector<std::shared_ptr<const Leaves>> layouts_ TORCHCACHE_GUARDED_BY(mutex_);
  core::AtFork at_fork_{mutex_};
};

}  // namespace torchcache::memory
