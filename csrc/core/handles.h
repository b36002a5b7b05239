// Native objects behind the integers that Python holds.
#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>

#include "core/fork.h"
#include "core/mutex.h"

namespace torchcache::core {

// Thread-safe. An object lives until it is removed and the last operation on it has ended.
template <class T>
class Handles {
 public:
  explicit Handles(const char* name) : name_(name) {}

  int64_t add(std::shared_ptr<T> object) {
    MutexLock lock(mutex_);
    objects_.emplace(++last_, std::move(object));
    return last_;
  }

  std::shared_ptr<T> get(int64_t id) {
    MutexLock lock(mutex_);
    const auto position = objects_.find(id);
    if (position == objects_.end())
      throw std::invalid_argument(std::string("no open ") + name_ + " has the id " + std::to_string(id));
    return position->second;
  }

  // The caller's pointer dies after the lock is free: destructors may lock other mutexes.
  std::shared_ptr<T> remove(int64_t id) {
    MutexLock lock(mutex_);
    const auto position = objects_.find(id);
    if (position == objects_.end()) return nullptr;
    auto object = std::move(position->second);
    objects_.erase(position);
    return object;
  }

 private:
  const char* name_;
  Mutex mutex_;
  int64_t last_ TORCHCACHE_GUARDED_BY(mutex_) = 0;
  std::unordered_map<int64_t, std::shared_ptr<T>> objects_ TORCHCACHE_GUARDED_BY(mutex_);
  AtFork at_fork_{mutex_};
};

}  // namespace torchcache::core
