// The arenas of the memory tier: the tensors in which rows lie.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "fork.h"

namespace torchcache {

// Layout → one arena [capacity, …] for each leaf. Thread-safe. A row must not be written any more once its slot can be
// looked up.
class Arenas {
 public:
  using Tensor = torch::stable::Tensor;

  // std::invalid_argument for tensors that are not contiguous on the CPU.
  void add(int64_t layout, const std::vector<Tensor>& leaves);

  // The rows of these slots as fresh leaves [n, …]; no leaves for a layout that was not added.
  std::vector<Tensor> gather(int64_t layout, const int64_t* slots, size_t n) const;

 private:
  struct Arena {
    explicit Arena(const Tensor& t);
    Tensor gather(const int64_t* slots, int64_t n) const;

    Tensor owner;
    const uint8_t* rows;
    int64_t row_bytes;
    int32_t dtype;
    std::vector<int64_t> sizes, strides;
  };
  using Leaves = std::vector<Arena>;

  std::shared_ptr<const Leaves> of(int64_t layout) const;

  mutable std::mutex mutex_;
  std::vector<std::shared_ptr<const Leaves>> layouts_;
  AtFork at_fork_{[this] { mutex_.lock(); }, [this](bool) { mutex_.unlock(); }};
};

}  // namespace torchcache
