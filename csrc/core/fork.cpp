#include "core/fork.h"

#include <pthread.h>

#include <atomic>
#include <unordered_set>
#include <utility>

namespace torchcache::core {

// One registration with the system for all objects.
struct ForkRegistry {
  Mutex mutex;
  std::unordered_set<AtFork*> live TORCHCACHE_GUARDED_BY(mutex);
  std::atomic<bool> forked{false};

  ForkRegistry() { pthread_atfork(prepare, parent, child); }

  // Never destroyed: objects may unregister while static destructors run.
  static ForkRegistry& instance() {
    static auto* registry = new ForkRegistry;
    return *registry;
  }

  static void prepare() TORCHCACHE_NO_THREAD_ANALYSIS {
    instance().mutex.lock();
    for (AtFork* object : instance().live) object->before_();
  }
  static void parent() { release(false); }
  static void child() {
    instance().forked = true;
    release(true);
  }
  static void release(bool child) TORCHCACHE_NO_THREAD_ANALYSIS {
    for (AtFork* object : instance().live) object->after_(child);
    instance().mutex.unlock();
  }
};

namespace {
const bool watching = (ForkRegistry::instance(), true);  // so that in_forked_child() counts from loading on
}

bool in_forked_child() { return watching && ForkRegistry::instance().forked; }

AtFork::AtFork(std::function<void()> before, std::function<void(bool)> after)
    : before_(std::move(before)), after_(std::move(after)) {
  MutexLock lock(ForkRegistry::instance().mutex);
  ForkRegistry::instance().live.insert(this);
}

AtFork::AtFork(Mutex& mutex)
    : AtFork([&mutex]() TORCHCACHE_NO_THREAD_ANALYSIS { mutex.lock(); },
             [&mutex](bool) TORCHCACHE_NO_THREAD_ANALYSIS { mutex.unlock(); }) {}

AtFork::~AtFork() {
  MutexLock lock(ForkRegistry::instance().mutex);
  ForkRegistry::instance().live.erase(this);
}

}  // namespace torchcache::core
