// Digests and keys of tensors on any device (docs/format.md, "Keys and digests").
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "hash/digest.h"
#include "hash/watch.h"

namespace torchcache::hash {

struct HashedBatch {
  std::vector<Digest> keys;
  int64_t probe;  // of the watch; 0 without one
};

// Computes the keys of a batch, H(call ‖ row digest of each argument), and a probe of the watch unless that is null.
// Each device gets one request. A device computes the keys if it holds all arguments; otherwise the CPU does.
//   rows: tensors [B, …], any dtype, any strides     call: the call digest
HashedBatch hash_batch(const std::vector<torch::stable::Tensor>& rows, Digest call, const Watch* watch);

// Digest of each tensor as if it were one row.
std::vector<Digest> digests(const std::vector<torch::stable::Tensor>& tensors);

int64_t probe(const Watch& watch);

}  // namespace torchcache::hash
