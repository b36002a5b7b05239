// Digests and keys of tensors, wherever they are (docs/format.md, "Keys and digests").
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "hash/digest.h"
#include "hash/watch.h"

namespace torchcache {

struct Seen {
  std::vector<Digest> keys;
  int64_t probe;  // of the watch; 0 without one
};

// Keys of a batch: H(call ‖ row digest of each argument); and a probe of the watch, unless that is null. Each device is
// asked once. Keys are made where all arguments are, or on the CPU if those are in several places.
//   rows: tensors [B, …], any dtype, any strides     call: the call digest
Seen see(const std::vector<torch::stable::Tensor>& rows, Digest call, const Watch* watch);

// Digest of each tensor as if it were one row.
std::vector<Digest> digests(const std::vector<torch::stable::Tensor>& tensors);

int64_t probe(const Watch& watch);

}  // namespace torchcache
