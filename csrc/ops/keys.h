// Operations on keys, and on the watch of the state.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <utility>
#include <vector>

#include "hash/device.h"
#include "hash/keys.h"
#include "hash/watch.h"
#include "ops/tensors.h"

namespace torchcache::ops {

// NOLINTBEGIN(performance-unnecessary-value-param): TORCH_BOX passes arguments by value

// Deliberately never destroyed: operations may still run in other threads while the process exits.
inline Handles<hash::Watch>& watches() {
  static auto* instance = new Handles<hash::Watch>("watch");
  return *instance;
}

inline Tensor keys(std::vector<Tensor> rows, int64_t low, int64_t high) {
  return keys_tensor(hash::hash_batch(rows, digest_of(low, high), nullptr).keys);
}
inline Tensor digests_op(std::vector<Tensor> tensors) { return keys_tensor(hash::digests(tensors)); }

inline std::vector<int64_t> cuda_architectures() {
  return hash::device_hasher() == nullptr ? std::vector<int64_t>{} : hash::device_hasher()->architectures();
}

inline Tensor probes(std::vector<Tensor> tensors) {
  std::vector<int64_t> values;
  values.reserve(tensors.size());
  for (const Tensor& t : tensors) values.push_back(hash::probe_on_host(t));
  return int64_tensor(values);
}

inline int64_t watch_open(std::vector<Tensor> tensors) {
  return watches().add(std::make_shared<hash::Watch>(std::move(tensors)));
}
inline int64_t watch_probe(int64_t watch) { return hash::probe(*watches().get(watch)); }
inline void watch_close(int64_t watch) { watches().remove(watch); }

// NOLINTEND(performance-unnecessary-value-param)

}  // namespace torchcache::ops
