// Faults of the store that only native code can make: failing, short and hanging system calls,
// crowded keys, many threads, forks. Each test is named after its promise.
//
// Run: store_test DIRECTORY [NAME]. Prints the name of each test; ends at the first broken promise.
#include "store/store.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "store/index.h"

#define EXPECT(condition)                                                          \
  do {                                                                             \
    if (!(condition)) {                                                            \
      std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
      std::_Exit(1);                                                               \
    }                                                                              \
  } while (false)

using namespace torchcache;
using namespace torchcache::store;

namespace {

const SystemCalls kReal = system_calls;
std::string scratch;
std::string directory;  // of the running test

constexpr uint64_t kRowBytes = 1000;
const char kLayout[] = "a layout";

Options options() {
  Options o;
  o.directory = directory;
  o.max_bytes = uint64_t{1} << 40;
  o.retry_seconds = 0.01;
  o.patience_seconds = 0.2;
  return o;
}

// Distinct rows that tell what they must be.
struct Rows {
  std::vector<Digest> keys;
  std::vector<uint8_t> bytes;

  Rows(size_t n, uint64_t seed, uint64_t row_bytes = kRowBytes) {
    for (size_t i = 0; i < n; ++i) {
      const uint64_t name[2] = {seed, i};
      keys.push_back(digest(name, sizeof name));
      for (uint64_t b = 0; b < row_bytes; ++b) bytes.push_back(static_cast<uint8_t>((keys[i].low >> (b % 57)) + b * b));
    }
  }
  size_t n() const { return keys.size(); }
  uint64_t row_bytes() const { return bytes.size() / n(); }
};

size_t put(Store& store, const Rows& rows) {
  return store.put(rows.keys.data(), rows.n(), kLayout, {{rows.bytes.data(), rows.row_bytes()}});
}

// How many rows are read; those that are must be right.
size_t right_rows(Store& store, const Rows& rows) {
  std::vector<uint8_t> out(rows.bytes.size()), ok(rows.n());
  store.read(rows.keys.data(), rows.n(), kLayout, {{out.data(), rows.row_bytes()}}, ok.data());
  size_t right = 0;
  for (size_t i = 0; i < rows.n(); ++i) {
    if (!ok[i]) continue;
    ++right;
    const size_t at = i * rows.row_bytes();
    EXPECT(memcmp(&out[at], &rows.bytes[at], rows.row_bytes()) == 0);
  }
  return right;
}

size_t found_rows(Store& store, const Rows& rows) {
  std::vector<uint8_t> present(rows.n());
  store.find(rows.keys.data(), rows.n(), present.data());
  size_t found = 0;
  for (uint8_t p : present) found += p;
  return found;
}

// ---- system calls that fail

std::atomic<int> failing{0};       // an errno for every write, or 0
std::atomic<long> calls_left{-1};  // the call that reaches 0 fails with EIO
std::atomic<unsigned> interruptions{0};

bool this_one_fails() { return calls_left >= 0 && calls_left-- == 0; }

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

ssize_t short_pwritev(int fd, const iovec* parts, int, off_t offset) {
  if (interruptions++ % 3 == 0) return errno = EINTR, -1;
  const iovec one = {parts->iov_base, std::min<size_t>(parts->iov_len, 100)};
  return kReal.pwritev(fd, &one, 1, offset);
}

ssize_t short_pread(int fd, void* out, size_t size, off_t offset) {
  if (interruptions++ % 3 == 0) return errno = EINTR, -1;
  return kReal.pread(fd, out, std::min<size_t>(size, 100), offset);
}

// Fills a disk that has room for two rows only.
ssize_t small_disk_pwritev(int fd, const iovec* parts, int count, off_t offset) {
  size_t size = 0;
  for (int i = 0; i < count; ++i) size += parts[i].iov_len;
  if (size <= 3 * kRowBytes) return kReal.pwritev(fd, parts, count, offset);
  return errno = ENOSPC, -1;
}

std::mutex hanging_mutex;
std::condition_variable hanging;
bool hangs = false;

ssize_t hanging_pwritev(int fd, const iovec* parts, int count, off_t offset) {
  std::unique_lock lock(hanging_mutex);
  hanging.wait(lock, [] { return !hangs; });
  return kReal.pwritev(fd, parts, count, offset);
}

// ---- the promises

void rows_that_were_put_are_found_before_and_after_they_are_written() {
  auto store = Store::open(options());
  const Rows rows(300, 1);
  EXPECT(put(*store, rows) == 300 && right_rows(*store, rows) == 300);
  store->flush();
  EXPECT(store->stats().queued_rows == 0 && right_rows(*store, rows) == 300);
  store->close();
  EXPECT(right_rows(*store, rows) == 0 && found_rows(*store, rows) == 0);
  EXPECT(right_rows(*Store::open(options()), rows) == 300);
}

void short_and_interrupted_transfers_are_normal() {
  system_calls.pwritev = short_pwritev;
  system_calls.pread = short_pread;
  auto store = Store::open(options());
  const Rows rows(50, 1);
  put(*store, rows);
  store->close();
  store = Store::open(options());
  EXPECT(right_rows(*store, rows) == 50);
  EXPECT(store->stats().damaged_rows == 0 && store->take_warnings().empty());
}

void a_failed_call_costs_rows_but_is_never_a_wrong_one() {
  const Rows early(20, 1), late(20, 2);
  {
    auto store = Store::open(options());
    put(*store, early);
  }
  system_calls = {failing_open, failing_fstat, failing_pread, failing_pwritev, kReal.ftruncate, kReal.fsync};
  for (long call = 0; call < 40; ++call) {
    calls_left = call;
    auto store = Store::open(options());
    right_rows(*store, early);
    put(*store, late);
    store->flush();
    right_rows(*store, late);
    store->close();
    calls_left = -1;
    store = Store::open(options());
    EXPECT(right_rows(*store, early) == 20);
  }
}

void a_full_disk_is_one_warning_and_writing_resumes() {
  system_calls.pwritev = failing_pwritev;
  auto store = Store::open(options());
  const Rows first(10, 1), second(10, 2);
  put(*store, first);
  store->flush();
  failing = ENOSPC;
  put(*store, second);
  EXPECT(right_rows(*store, second) == 10);  // from memory
  EXPECT(right_rows(*store, first) == 10);
  while (store->take_warnings().empty()) std::this_thread::yield();
  failing = 0;
  store->flush();
  EXPECT(store->take_warnings().empty() && store->stats().dropped_rows == 0);
  store->close();
  store = Store::open(options());
  EXPECT(right_rows(*store, first) == 10 && right_rows(*store, second) == 10);
}

void a_nearly_full_disk_gets_smaller_blocks() {
  system_calls.pwritev = small_disk_pwritev;
  auto store = Store::open(options());
  const Rows rows(100, 1);
  put(*store, rows);
  store->flush();
  EXPECT(store->stats().dropped_rows == 0);
  store->close();
  EXPECT(right_rows(*Store::open(options()), rows) == 100);
}

void rows_are_dropped_and_counted_when_nothing_can_be_written() {
  system_calls.pwritev = failing_pwritev;
  Options small = options();
  small.queue_bytes = 20 * kRowBytes;
  auto store = Store::open(small);
  put(*store, Rows(1, 9));
  store->flush();
  failing = EDQUOT;
  const Rows rows(100, 1);
  EXPECT(put(*store, rows) == 100);  // in the end they are not kept, but training goes on
  EXPECT(store->stats().queued_bytes <= small.queue_bytes);
  store->flush();
  EXPECT(store->stats().dropped_rows == 100 && store->stats().queued_rows == 0);
  EXPECT(found_rows(*store, rows) == 0 && !store->stats().full);
  EXPECT(store->take_warnings().size() == 2);  // the cause, and that rows are lost
  failing = 0;
  put(*store, rows);
  store->flush();
  EXPECT(right_rows(*store, rows) == 100);
}

void a_write_that_hangs_stops_nobody() {
  auto store = Store::open(options());
  put(*store, Rows(1, 9));
  store->flush();
  system_calls.pwritev = hanging_pwritev;
  hangs = true;
  put(*store, Rows(10, 1));
  EXPECT(right_rows(*store, Rows(10, 1)) == 10);
  store->close();
  std::lock_guard lock(hanging_mutex);
  hangs = false;
  hanging.notify_all();
}

void a_file_where_the_directory_should_be_is_one_warning() {
  std::fclose(std::fopen(directory.c_str(), "w"));
  auto store = Store::open(options());
  EXPECT(store->take_warnings().empty());  // nothing to find there: only writing is worth a word
  EXPECT(put(*store, Rows(5, 1)) == 5 && put(*store, Rows(5, 2)) == 5);
  store->flush();
  const std::vector<std::string> warnings = store->take_warnings();
  EXPECT(warnings.size() == 1 && warnings[0].find(directory) != std::string::npos);
  EXPECT(store->stats().dropped_rows == 10 && store->stats().bytes_written == 0);
}

void a_deleted_directory_is_made_again() {
  auto store = Store::open(options());
  const Rows early(10, 1), late(10, 2);
  put(*store, early);
  store->flush();
  std::filesystem::remove_all(directory);
  put(*store, late);
  store->flush();
  EXPECT(store->take_warnings().size() == 1);
  EXPECT(found_rows(*store, early) == 0 && right_rows(*store, late) == 10);
  put(*store, early);
  store->close();
  store = Store::open(options());
  EXPECT(right_rows(*store, early) == 10 && right_rows(*store, late) == 10);
}

[[maybe_unused]] void after_a_fork_both_sides_write_and_neither_touches_the_other() {
  auto store = Store::open(options());
  const Rows before(2000, 1), of_parent(500, 2), of_child(500, 3);
  put(*store, before);  // partly still in the queue
  const pid_t child = fork();
  if (child == 0) {
    EXPECT(store->stats().queued_rows == 0 && store->stats().bytes_written == 0);
    right_rows(*store, before);
    put(*store, of_child);
    EXPECT(right_rows(*store, of_child) == 500);
    store->close();
    std::_Exit(0);
  }
  put(*store, of_parent);
  int status = -1;
  waitpid(child, &status, 0);
  EXPECT(status == 0);
  EXPECT(right_rows(*store, before) == 2000 && right_rows(*store, of_parent) == 500);
  store->close();
  store = Store::open(options());
  EXPECT(right_rows(*store, before) == 2000 && right_rows(*store, of_parent) == 500);
  EXPECT(right_rows(*store, of_child) == 500 && store->stats().damaged_rows == 0);
}

[[maybe_unused]] void forks_at_any_moment_leave_a_store_that_works() {
  auto store = Store::open(options());
  std::atomic<bool> stop{false};
  std::vector<std::thread> threads;
  for (uint64_t t = 0; t < 3; ++t)
    threads.emplace_back([&, t] {
      for (uint64_t i = 0; !stop; ++i) {
        const Rows rows(7, 1000 * t + i % 1000);
        put(*store, rows);
        right_rows(*store, rows);
      }
    });
  for (uint64_t i = 0; i < 20; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      const Rows rows(5, 100000 + i);
      put(*store, rows);
      store->flush();
      std::_Exit(right_rows(*store, rows) == 5 ? 0 : 1);
    }
    int status = -1;
    waitpid(child, &status, 0);
    EXPECT(status == 0);
  }
  stop = true;
  for (std::thread& thread : threads) thread.join();
}

void many_threads_put_and_read_at_once() {
  auto store = Store::open(options());
  std::vector<std::thread> threads;
  for (uint64_t t = 0; t < 8; ++t)
    threads.emplace_back([&, t] {
      for (uint64_t i = 0; i < 30; ++i) {
        const Rows mine(20, i % 2 == 0 ? i : 100 * t + i);  // every second batch is everybody's
        EXPECT(put(*store, mine) == 20 && found_rows(*store, mine) == 20);
        EXPECT(right_rows(*store, mine) == 20);
        if (i % 10 == 0) store->flush();
      }
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT(store->stats().damaged_rows == 0 && store->stats().dropped_rows == 0);
}

void more_segments_than_may_be_open_are_all_read() {
  for (uint64_t i = 0; i < 150; ++i) put(*Store::open(options()), Rows(2, i));
  auto store = Store::open(options());
  for (int round = 0; round < 2; ++round)
    for (uint64_t i = 0; i < 150; ++i) EXPECT(right_rows(*store, Rows(2, i)) == 2);
  size_t open_files = 0;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd"))
    open_files += std::filesystem::read_symlink(entry).string().find(directory) == 0;
  EXPECT(open_files <= 128);
}

void the_index_takes_at_most_40_bytes_a_row_and_finds_every_key() {
  constexpr uint32_t kRows = 1000000;
  Index index;
  for (uint64_t row = 0; row < kRows; ++row) {
    if (row % 8 == 0) index.add_block({});
    index.insert({digest(&row, 8).low, row, static_cast<uint32_t>(row / 8), static_cast<uint32_t>(row % 8)});
  }
  for (uint64_t row = 0; row < kRows; ++row)
    EXPECT(index.find(digest(&row, 8).low, [&](const Entry& e) { return e.check == row; }));
  EXPECT(index.keys() == kRows && index.memory_bytes() <= 40 * uint64_t{kRows});
}

void keys_that_crowd_together_are_found() {
  constexpr uint32_t kRows = 200000;
  Index index;
  index.add_block({});
  for (uint32_t row = 0; row < kRows; ++row) index.insert({row, row, 0, row});
  EXPECT(index.keys() == kRows);
  for (uint32_t row = 0; row < kRows; ++row) EXPECT(index.find(row, [&](const Entry& e) { return e.row == row; }));
}

void a_dropped_entry_gives_way_to_the_next_copy() {
  Index index;
  index.add_block({});
  for (uint32_t row = 0; row < 3; ++row) index.insert({7, row, 0, row});
  const auto first = [&] { return index.find(7, [](const Entry&) { return true; }); };
  EXPECT(index.keys() == 1 && first()->row == 0);
  EXPECT(index.drop(7, 0, 0) && !index.drop(7, 0, 0) && first()->row == 1);
  EXPECT(index.drop(7, 0, 1) && index.drop(7, 0, 2) && first() == nullptr && index.keys() == 0);
  index.insert({7, 9, 0, 9});
  EXPECT(index.keys() == 1 && first()->row == 9);
}

struct Test {
  const char* name;
  void (*run)();
};
#define TEST(name) {#name, name}
const Test kTests[] = {
    TEST(rows_that_were_put_are_found_before_and_after_they_are_written),
    TEST(short_and_interrupted_transfers_are_normal),
    TEST(a_failed_call_costs_rows_but_is_never_a_wrong_one),
    TEST(a_full_disk_is_one_warning_and_writing_resumes),
    TEST(a_nearly_full_disk_gets_smaller_blocks),
    TEST(rows_are_dropped_and_counted_when_nothing_can_be_written),
    TEST(a_write_that_hangs_stops_nobody),
    TEST(a_file_where_the_directory_should_be_is_one_warning),
    TEST(a_deleted_directory_is_made_again),
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
    // The sanitizers' own allocator stays locked in a child that was forked beside threads.
    TEST(after_a_fork_both_sides_write_and_neither_touches_the_other),
    TEST(forks_at_any_moment_leave_a_store_that_works),
#endif
    TEST(many_threads_put_and_read_at_once),
    TEST(more_segments_than_may_be_open_are_all_read),
    TEST(the_index_takes_at_most_40_bytes_a_row_and_finds_every_key),
    TEST(keys_that_crowd_together_are_found),
    TEST(a_dropped_entry_gives_way_to_the_next_copy),
};

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) return std::fprintf(stderr, "usage: store_test DIRECTORY [NAME]\n"), 2;
  scratch = argv[1];
  for (const Test& test : kTests) {
    if (argc > 2 && std::string(argv[2]) != test.name) continue;
    std::printf("%s\n", test.name);
    std::fflush(stdout);
    directory = scratch + "/" + test.name;
    test.run();
    system_calls = kReal;
    failing = 0;
  }
  return 0;
}
