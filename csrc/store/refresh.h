// Finding out what other processes have written into the directory.
#pragma once

#include "store/state.h"

namespace torchcache::store {

// Whether the last refresh is long enough ago: max(0.25 s, 100 times what it cost). The caller holds the mutex.
bool refresh_is_due(const State& state);

// Lists the directory, forgets segments that are gone, reads what is new in the others. Returns false at once if
// another thread is at it. Takes the mutex; the caller must not hold it.
bool refresh(State& state);

}  // namespace torchcache::store
