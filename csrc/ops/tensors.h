// Between torch's tensors and what the parts take and give that do not use torch.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <stdexcept>
#include <vector>

#include "core/handles.h"
#include "core/tensors.h"
#include "hash/digest.h"

namespace torchcache::ops {

using core::Handles;
using core::new_int64;
using hash::Digest;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct KeyArray {
  const Digest* data;
  size_t count;
};

inline KeyArray as_keys(const Tensor& keys) {
  if (keys.dim() != 2 || keys.size(1) != 2 || keys.scalar_type() != ScalarType::Long || !keys.is_contiguous() ||
      !keys.is_cpu())
    throw std::invalid_argument("keys must be a contiguous int64 tensor [B, 2] on the CPU");
  return {static_cast<const Digest*>(keys.const_data_ptr()), static_cast<size_t>(keys.size(0))};
}

inline Tensor int64_tensor(const std::vector<int64_t>& values) {
  Tensor result = new_int64(values.size());
  if (!values.empty()) memcpy(result.mutable_data_ptr(), values.data(), 8 * values.size());
  return result;
}

inline Tensor bool_tensor(size_t n) { return torch::stable::empty({static_cast<int64_t>(n)}, ScalarType::Bool); }

inline Tensor keys_tensor(const std::vector<Digest>& keys) {
  Tensor result = new_int64(keys.size(), 2);
  if (!keys.empty()) memcpy(result.mutable_data_ptr(), keys.data(), sizeof(Digest) * keys.size());
  return result;
}

inline Digest digest_of(int64_t low, int64_t high) { return {static_cast<uint64_t>(low), static_cast<uint64_t>(high)}; }

}  // namespace torchcache::ops
