// Looking for what other processes have written into the directory.
#pragma once

#include "store/state.h"

namespace torchcache::store {

// Whether the last look is long enough ago: max(0.25 s, 100 times what it cost). The caller holds
// the mutex.
bool look_is_due(const State& state);

// Lists the directory, forgets segments that are gone, reads what is new in the others. Returns false
// at once if another thread is looking. Takes the mutex; the caller must not hold it.
bool look(State& state);

}  // namespace torchcache::store
