// A compaction that is killed at the n-th call that changes a file or a folder, for every n: no row is lost, and the
// next compaction ends with one segment.
//
// Run: compaction_test DIRECTORY, which must not exist.
#include "store/maintenance/compaction.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>

#include "store/store.h"

using namespace torchcache::store;

#define EXPECT(condition)                                                          \
  do {                                                                             \
    if (!(condition)) {                                                            \
      std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
      std::_Exit(1);                                                               \
    }                                                                              \
  } while (false)

namespace {

long calls_left = -1;  // the call that finds 0 kills; never if negative

void one_more_call() {
  if (calls_left >= 0 && calls_left-- == 0) ::kill(::getpid(), SIGKILL);
}

}  // namespace

// In place of the C library's, for the whole program.
extern "C" int rename(const char* from, const char* to) noexcept {
  one_more_call();
  return static_cast<int>(::syscall(SYS_renameat2, AT_FDCWD, from, AT_FDCWD, to, 0));
}
extern "C" int unlink(const char* path) noexcept {
  one_more_call();
  return static_cast<int>(::syscall(SYS_unlinkat, AT_FDCWD, path, 0));
}
extern "C" int rmdir(const char* path) noexcept {
  one_more_call();
  return static_cast<int>(::syscall(SYS_unlinkat, AT_FDCWD, path, AT_REMOVEDIR));
}
extern "C" int mkdir(const char* path, mode_t mode) noexcept {
  one_more_call();
  return static_cast<int>(::syscall(SYS_mkdirat, AT_FDCWD, path, mode));
}

namespace {

const SystemCalls kReal = system_calls;
std::string directory;

ssize_t counted_pwritev(int fd, const iovec* parts, int count, off_t offset) {
  if (calls_left == 0) kReal.pwritev(fd, parts, 1, offset);  // killed in the middle of it
  one_more_call();
  return kReal.pwritev(fd, parts, count, offset);
}

int counted_open(const char* path, int flags, mode_t mode) {
  if (flags & O_CREAT) one_more_call();
  return kReal.open(path, flags, mode);
}

int counted_fsync(int fd) {
  one_more_call();
  return kReal.fsync(fd);
}

constexpr size_t kRows = 10;

struct Rows {
  std::vector<Digest> keys;
  std::vector<uint64_t> values;
  explicit Rows(uint64_t seed) {
    for (uint64_t i = 0; i < kRows; ++i) {
      const uint64_t name[2] = {seed, i};
      keys.push_back(digest(name, sizeof name));
      values.push_back(keys[i].high);
    }
  }
};

std::shared_ptr<Store> open_store() {
  Options options;
  options.directory = directory;
  options.max_bytes = uint64_t{1} << 40;
  return Store::open(options);
}

std::vector<SegmentId> segments() {
  std::vector<SegmentId> ids;
  EXPECT(list_segments(directory, &ids) == 0);
  return ids;
}

void write_segments() {
  std::filesystem::remove_all(directory);
  for (uint64_t seed = 0; seed < 3; ++seed) {
    const auto store = open_store();
    for (const uint64_t some : {seed, uint64_t{7}}) {
      const Rows rows(some);
      store->write(rows.keys.data(), kRows, "layout", {{reinterpret_cast<const uint8_t*>(rows.values.data()), 8}});
      store->flush();
    }
    store->close();
  }
}

void expect_all_rows() {
  const auto store = open_store();
  for (const uint64_t seed : {0, 1, 2, 7}) {
    const Rows rows(seed);
    std::vector<uint64_t> out(kRows);
    std::vector<uint8_t> ok(kRows);
    store->read(rows.keys.data(), kRows, "layout", {{reinterpret_cast<uint8_t*>(out.data()), 8}}, ok.data());
    for (const uint8_t one : ok) EXPECT(one == 1);
    EXPECT(out == rows.values);
  }
  store->close();
}

void compact_all() {
  Compaction compaction(directory);
  for (const SegmentId& id : segments()) EXPECT(compaction.add_segment(id));
  compaction.finish();
}

// Whether the compaction came to its end.
bool compact_and_die_at(long call) {
  const pid_t child = ::fork();
  if (child == 0) {
    calls_left = call;
    compact_all();
    std::_Exit(0);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  EXPECT(status == 0 || (WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL));
  return status == 0;
}

}  // namespace

int main(int, char** arguments) {
  directory = arguments[1];
  system_calls.open = counted_open;
  system_calls.pwritev = counted_pwritev;
  system_calls.fsync = counted_fsync;
  long call = 0;
  for (bool ended = false; !ended; ++call) {
    write_segments();
    ended = compact_and_die_at(call);
    expect_all_rows();
    compact_all();
    expect_all_rows();
    EXPECT(segments().size() == 1);
  }
  EXPECT(call > 10);  // there were as many steps to be killed at
  std::printf("killed at each of %ld calls\n", call - 1);
}
