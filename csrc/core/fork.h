// What a fork must not break: locks held by threads that the child does not have, and torch's thread pool.
#pragma once

#include <functional>

#include "core/mutex.h"

namespace torchcache::core {

// True in a process that was forked after this library was loaded.
bool in_forked_child();

// Makes an object with locks safe to fork. As the last member of its owner it is made when the owner is complete and
// goes before any other part of it. Thread-safe.
class AtFork {
 public:
  // before: acquire every lock. after: release them; with true, in the child, also drop what belongs to the parent.
  AtFork(std::function<void()> before, std::function<void(bool)> after);
  // For an object with one lock.
  explicit AtFork(Mutex& mutex);
  ~AtFork();
  AtFork(const AtFork&) = delete;
  AtFork& operator=(const AtFork&) = delete;

 private:
  friend struct ForkRegistry;
  std::function<void()> before_;
  std::function<void(bool)> after_;
};

}  // namespace torchcache::core
