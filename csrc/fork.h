// What a fork must not break: locks held by threads that the child does not have, and torch's thread pool.
#pragma once

namespace torchcache {

// True in a process that was forked after this library was loaded.
bool in_forked_child();

// Something with locks that a fork must find free. Objects register while they live; registering is thread-safe.
class ForkAware {
 public:
  ForkAware();
  virtual ~ForkAware();
  ForkAware(const ForkAware&) = delete;
  ForkAware& operator=(const ForkAware&) = delete;

  virtual void before_fork() = 0;           // take every lock
  virtual void after_fork(bool child) = 0;  // release them; the child also forgets what belongs to its parent
};

}  // namespace torchcache
