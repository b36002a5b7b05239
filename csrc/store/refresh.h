// Finding out what other processes have written into the directory.
#pragma once

#include "store/state.h"

namespace torchcache::store {

// Whether the last refresh is long enough ago: max(0.25 s, 100 times what it cost).
bool refresh_is_due(const State& state) TORCHCACHE_REQUIRES(state.mutex);

// Lists the directory, forgets segments that are gone, reads what is new in the others. Returns false at once if
// another thread is at it.
bool refresh(State& state) TORCHCACHE_EXCLUDES(state.mutex);

}  // namespace torchcache::store
