// A cheap look at tensors that are not expected to change: where they lie, their shape, and a few of their words.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

namespace torchcache {

// Keeps the tensors alive. `probe` gives the same number as long as nothing it looks at changed.
// It sees replaced storage, changed shapes and updates of whole tensors that no version counter records
// (`p.data.mul_(0.99)`); an edit of single elements it may miss.
class Watch {
 public:
  explicit Watch(std::vector<torch::stable::Tensor> tensors);
  int64_t probe() const;

 private:
  std::vector<torch::stable::Tensor> tensors_;  // what they are may change: `p.data = …`, `module.half()`
};

}  // namespace torchcache
