// Row digests and keys of CPU tensors (docs/format.md, "Keys and digests").
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "hash/digest.h"

namespace torchcache {

// Keys of a batch: H(call ‖ row digest of each argument).
//   rows: tensors [B, …], any dtype, any strides     call: int64 [2], low and high half of the call digest
std::vector<Digest> keys_of_rows(const std::vector<torch::stable::Tensor>& rows, const torch::stable::Tensor& call);

// Digest of each tensor as if it were one row. Returns int64 [N, 2].
torch::stable::Tensor digests_cpu(std::vector<torch::stable::Tensor> tensors);

}  // namespace torchcache
