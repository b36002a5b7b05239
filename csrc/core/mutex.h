// A mutex, its locks and a condition variable, annotated for clang's thread-safety analysis.
#pragma once

#include <atomic>
#include <cassert>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "core/thread_annotations.h"

namespace torchcache::core {

class TORCHCACHE_CAPABILITY("mutex") Mutex {
 public:
  void lock() TORCHCACHE_ACQUIRE() {
    mutex_.lock();
    set_owner(std::this_thread::get_id());
  }
  void unlock() TORCHCACHE_RELEASE() {
    set_owner({});
    mutex_.unlock();
  }
  // Where the analysis cannot follow which mutex a pointer leads to. Checked at run time in debug builds.
  void assert_held() const TORCHCACHE_ASSERT_HELD(this) {
#if !defined(NDEBUG)
    assert(owner_ == std::this_thread::get_id());
#endif
  }

 private:
  friend class Condition;

#if defined(NDEBUG)
  void set_owner(std::thread::id) {}
#else
  void set_owner(std::thread::id id) { owner_ = id; }
  std::atomic<std::thread::id> owner_{};
#endif
  std::mutex mutex_;
};

class TORCHCACHE_SCOPED_CAPABILITY MutexLock {
 public:
  explicit MutexLock(Mutex& mutex) TORCHCACHE_ACQUIRE(mutex) : mutex_(mutex) { mutex_.lock(); }
  ~MutexLock() TORCHCACHE_RELEASE() { mutex_.unlock(); }
  MutexLock(const MutexLock&) = delete;
  MutexLock& operator=(const MutexLock&) = delete;

 private:
  Mutex& mutex_;
};

// Releases a mutex that the caller holds, and acquires it again.
class TORCHCACHE_SCOPED_CAPABILITY MutexUnlock {
 public:
  explicit MutexUnlock(Mutex& mutex) TORCHCACHE_RELEASE(mutex) : mutex_(mutex) { mutex_.unlock(); }
  ~MutexUnlock() TORCHCACHE_RELEASE() TORCHCACHE_NO_THREAD_ANALYSIS { mutex_.lock(); }
  MutexUnlock(const MutexUnlock&) = delete;
  MutexUnlock& operator=(const MutexUnlock&) = delete;

 private:
  Mutex& mutex_;
};

// A condition variable. Waits may end without a reason.
class Condition {
 public:
  void wait(Mutex& mutex) TORCHCACHE_REQUIRES(mutex) {
    std::unique_lock lock(mutex.mutex_, std::adopt_lock);
    mutex.set_owner({});
    condition_.wait(lock);
    mutex.set_owner(std::this_thread::get_id());
    lock.release();
  }
  void wait_until(Mutex& mutex, std::chrono::steady_clock::time_point end) TORCHCACHE_REQUIRES(mutex) {
    std::unique_lock lock(mutex.mutex_, std::adopt_lock);
    mutex.set_owner({});
    condition_.wait_until(lock, end);
    mutex.set_owner(std::this_thread::get_id());
    lock.release();
  }
  void notify_one() { condition_.notify_one(); }
  void notify_all() { condition_.notify_all(); }

 private:
  std::condition_variable condition_;
};

}  // namespace torchcache::core
