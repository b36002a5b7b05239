// Rows out of the segments and the queue, into the caller's memory.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "store/state.h"

namespace torchcache::store {

// As Store::read.
void read_rows(State& state, const Digest* keys, size_t n, const std::string& layout, const std::vector<Leaf>& out,
               uint8_t* ok) TORCHCACHE_EXCLUDES(state.mutex);

}  // namespace torchcache::store
