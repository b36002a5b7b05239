// System calls that fail, are cut short or hang, to be put in the place of the real ones.
#pragma once

#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <mutex>

#include "store/os/file.h"

namespace torchcache::store {
namespace {

const SystemCalls kReal = system_calls;

std::atomic<int> failing{0};       // an errno for every write, or 0
std::atomic<long> calls_left{-1};  // the call that reaches 0 fails with EIO
std::atomic<unsigned> interruptions{0};

std::atomic<bool> lasting_fault{false};

bool this_one_fails() {
  if (lasting_fault && calls_left <= -2) return true;
  if (calls_left < 0) return false;
  if (calls_left-- != 0) return false;
  calls_left = -2;  // it has failed
  return true;
}

ssize_t failing_pwritev(int fd, const iovec* parts, int count, off_t offset) {
  if (failing == 0 && !this_one_fails()) return kReal.pwritev(fd, parts, count, offset);
  errno = failing != 0 ? failing.load() : EIO;
  return -1;
}

ssize_t failing_pread(int fd, void* out, size_t size, off_t offset) {
  if (!this_one_fails()) return kReal.pread(fd, out, size, offset);
  errno = EIO;
  return -1;
}

int failing_open(const char* path, int flags, mode_t mode) {
  if (!this_one_fails()) return kReal.open(path, flags, mode);
  errno = EIO;
  return -1;
}

int failing_fstat(int fd, struct stat* out) {
  if (!this_one_fails()) return kReal.fstat(fd, out);
  errno = EIO;
  return -1;
}

int failing_lstat(const char* path, struct stat* out) {
  return this_one_fails() ? (errno = EIO, -1) : kReal.lstat(path, out);
}
DIR* failing_opendir(const char* path) { return this_one_fails() ? (errno = EIO, nullptr) : kReal.opendir(path); }
int failing_mkdir(const char* path, mode_t mode) {
  return this_one_fails() ? (errno = EIO, -1) : kReal.mkdir(path, mode);
}
int failing_rename(const char* from, const char* to) {
  return this_one_fails() ? (errno = EIO, -1) : kReal.rename(from, to);
}
int failing_ftruncate(int fd, off_t size) { return this_one_fails() ? (errno = EIO, -1) : kReal.ftruncate(fd, size); }

SystemCalls failing_calls() {
  SystemCalls calls = kReal;
  calls.open = failing_open;
  calls.fstat = failing_fstat;
  calls.pread = failing_pread;
  calls.pwritev = failing_pwritev;
  calls.ftruncate = failing_ftruncate;
  calls.lstat = failing_lstat;
  calls.opendir = failing_opendir;
  calls.mkdir = failing_mkdir;
  calls.rename = failing_rename;
  return calls;
}

ssize_t short_pwritev(int fd, const iovec* parts, int, off_t offset) {
  if (interruptions++ % 3 == 0) return errno = EINTR, -1;
  const iovec one = {parts->iov_base, std::min<size_t>(parts->iov_len, 100)};
  return kReal.pwritev(fd, &one, 1, offset);
}

ssize_t short_pread(int fd, void* out, size_t size, off_t offset) {
  if (interruptions++ % 3 == 0) return errno = EINTR, -1;
  return kReal.pread(fd, out, std::min<size_t>(size, 100), offset);
}

// A disk that has room for small writes only.
ssize_t small_disk_pwritev(int fd, const iovec* parts, int count, off_t offset) {
  size_t size = 0;
  for (int i = 0; i < count; ++i) size += parts[i].iov_len;
  if (size <= 3000) return kReal.pwritev(fd, parts, count, offset);
  return errno = ENOSPC, -1;
}

// Writes that hang until `hangs` is false, and the threads that were in one and have not ended since.
std::mutex hanging_mutex;
std::condition_variable hanging;
bool hangs = false;
int hung_threads = 0;

// Made with the mutex held, in the thread that hangs.
struct HungThread {
  HungThread() {
    ++hung_threads;
    hanging.notify_all();
  }
  ~HungThread() {
    std::lock_guard lock(hanging_mutex);
    --hung_threads;
    hanging.notify_all();
  }
};

ssize_t hanging_pwritev(int fd, const iovec* parts, int count, off_t offset) {
  std::unique_lock lock(hanging_mutex);
  thread_local HungThread until_it_ends;
  hanging.wait(lock, [] { return !hangs; });
  return kReal.pwritev(fd, parts, count, offset);
}

}  // namespace
}  // namespace torchcache::store
