// The launches that make digests and keys of rows, one after the other. The caller performs each launch, and sets its
// counters to zero first. No CUDA and no torch here.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "hash/batch.h"
#include "hash/digest.h"
#include "hash/layout.h"

namespace torchcache::hash {

// Digests of space that a launch needs for the leaves and counters of such rows: none if every row is one leaf.
inline int64_t space_for(const Rows& rows) {
  const int64_t leaves = Batch{rows}.leaves_per_row(), counters = (rows.count + 3) / 4;
  return leaves == 1 ? 0 : rows.count * leaves + counters;
}

inline int64_t space_for(const std::vector<Rows>& several) {
  int64_t most = 0;  // one after the other uses the same space
  for (const Rows& rows : several) most = std::max(most, space_for(rows));
  return most;
}

// Of rows whose digests go one behind the other. For keys the caller says more.
inline Batch batch_of(const Rows& rows, Canonical* space, Canonical* digests) {
  Batch batch{rows};
  batch.digests = digests;
  if (const int64_t leaves = batch.leaves_per_row(); leaves > 1) {
    batch.leaves = space;
    batch.done = reinterpret_cast<uint32_t*>(space + rows.count * leaves);
  }
  return batch;
}

// Digests of space that launch_keys needs.
inline int64_t space_for_keys(const std::vector<Rows>& arguments) {
  const auto width = static_cast<int64_t>(arguments.size()) + 1;
  return arguments[0].count * width + space_for(arguments);
}

// Keys of a batch: H(call ‖ row digest of each argument).
template <class Launch>
void launch_keys(const std::vector<Rows>& arguments, Digest call, Canonical* space, Canonical* keys,
                 const Launch& launch) {
  const int64_t count = arguments[0].count, width = static_cast<int64_t>(arguments.size()) + 1;
  for (int64_t a = 1; a < width; ++a) {
    Batch batch = batch_of(arguments[a - 1], space + count * width, space + a);
    batch.stride = width;
    batch.first = a == 1;
    batch.call = canonical(call);
    batch.keys = a + 1 == width ? keys : nullptr;
    launch(batch);
  }
}

}  // namespace torchcache::hash
