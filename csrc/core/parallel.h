// Loops over torch's threads, where those may be used.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

#include "core/fork.h"

namespace torchcache::core {

// f(begin, end) for parts of 0 … n of at least `grain`. In a forked child in this thread alone: torch's thread pool
// does not survive a fork, and waiting for it would hang the child.
template <class F>
void parallel(int64_t n, int64_t grain, const F& f) {
  if (n <= grain || in_forked_child()) {
    f(0, n);
  } else {
    torch::stable::parallel_for(0, n, grain, f);
  }
}

}  // namespace torchcache::core
