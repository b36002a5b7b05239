// A cheap check of tensors that are not expected to change: where they lie, their shape, and some of their bytes.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "core/fork.h"
#include "core/mutex.h"
#include "hash/device.h"
#include "hash/xxh3.h"

namespace torchcache::hash {

// The running value of a probe; order matters.
struct Mix {
  uint64_t value = xxh3::kPrime64_1;
  void operator()(uint64_t word) { value = xxh3::fold(value ^ word, xxh3::kPrime64_3) + xxh3::kPrime64_2; }
};

// The part of a probe that the host computes, and the samples whose values the devices add to it.
struct HostProbe {
  uint64_t value = 0;
  std::vector<std::shared_ptr<const SampleList>> lists;  // one for each device
};

// Keeps the tensors alive. A probe is the same number as long as nothing that it reads changed.
// It detects replaced storage, changed shapes and updates of whole tensors that no version counter records
// (`p.data.mul_(0.99)`); an edit of single elements of a large tensor it may miss. Thread-safe.
class Watch {
 public:
  explicit Watch(std::vector<torch::stable::Tensor> tensors);
  HostProbe probe_host() const;

 private:
  using Lists = std::vector<std::shared_ptr<const SampleList>>;

  std::vector<torch::stable::Tensor> tensors_;  // what they are may change: `p.data = …`, `module.half()`
  mutable core::Mutex mutex_;
  mutable uint64_t listed_ TORCHCACHE_GUARDED_BY(mutex_) =
      0;  // the host's value that the lists belong to: addresses and shapes are part of it
  mutable Lists lists_ TORCHCACHE_GUARDED_BY(mutex_);
  core::AtFork at_fork_{mutex_};
};

// The probe of one tensor on the CPU, never 0; 0 of a tensor on a device.
int64_t probe_on_host(const torch::stable::Tensor& t);

}  // namespace torchcache::hash
