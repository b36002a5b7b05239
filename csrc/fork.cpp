#include "fork.h"

#include <pthread.h>

#include <atomic>
#include <mutex>
#include <unordered_set>

namespace torchcache {
namespace {

std::atomic<bool> forked{false};

// Never destroyed: objects may unregister while static destructors run.
struct Registry {
  std::mutex mutex;
  std::unordered_set<ForkAware*> live;

  Registry() { pthread_atfork(prepare, parent, child); }
  static void prepare();
  static void parent();
  static void child();
};

Registry& registry() {
  static auto* instance = new Registry;
  return *instance;
}

void Registry::prepare() {
  registry().mutex.lock();
  for (ForkAware* object : registry().live) object->before_fork();
}

void release(bool child) {
  for (ForkAware* object : registry().live) object->after_fork(child);
  registry().mutex.unlock();
}

void Registry::parent() { release(false); }

void Registry::child() {
  forked = true;
  release(true);
}

const bool watching = (registry(), true);  // so that in_forked_child() counts from loading on

}  // namespace

bool in_forked_child() { return watching && forked; }

ForkAware::ForkAware() {
  std::lock_guard lock(registry().mutex);
  registry().live.insert(this);
}

ForkAware::~ForkAware() {
  std::lock_guard lock(registry().mutex);
  registry().live.erase(this);
}

}  // namespace torchcache
