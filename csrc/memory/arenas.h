// The arenas of the memory tier: the tensors in which rows lie.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "core/fork.h"
#include "core/mutex.h"

namespace torchcache::memory {

// The rows of one leaf: chunks [rows, …], the first one from slot 0 on.
class Arena {
 public:
  using Tensor = torch::stable::Tensor;

  // std::invalid_argument for a tensor that is not contiguous.
  explicit Arena(const Tensor& chunk);

  // A chunk whose first row has the slot behind the last one.
  void add(int64_t first, const Tensor& chunk);

  // Whether this library can read there.
  bool is_readable() const;

  // The rows of these slots as a fresh tensor [n, …] on the device of the chunks; on the CPU in pinned memory if
  // wanted.
  Tensor gather(const int64_t* slots, int64_t n, bool pinned) const;

 private:
  struct Chunk {
    int64_t first;  // slot
    const uint8_t* rows;
    Tensor owner;
  };

  const uint8_t* row(int64_t slot) const;
  Tensor new_rows(int64_t n) const;
  Tensor new_pinned(int64_t n) const;

  std::vector<Chunk> chunks_;
  int32_t device_;  // see device_of
  int64_t row_bytes_;
  int32_t dtype_;
  std::vector<int64_t> sizes_, strides_;
};

// Layout → one arena for each leaf. Thread-safe. A row must not be written any more once its slot can be looked up.
class Arenas {
 public:
  using Tensor = torch::stable::Tensor;

  // The rows of a layout from slot `first` on: one tensor for each leaf.
  void add(int64_t layout, int64_t first, const std::vector<Tensor>& leaves);

  // The rows of these slots as fresh leaves [n, …], see Arena; no leaves for a layout that is unknown or not readable.
  std::vector<Tensor> gather(int64_t layout, const int64_t* slots, size_t n, bool pinned) const;

 private:
  using Leaves = std::vector<Arena>;

  std::shared_ptr<const Leaves> of(int64_t layout) const;

  mutable core::Mutex mutex_;
  std::vector<std::shared_ptr<const Leaves>> layouts_ TORCHCACHE_GUARDED_BY(mutex_);
  core::AtFork at_fork_{mutex_};
};

}  // namespace torchcache::memory
