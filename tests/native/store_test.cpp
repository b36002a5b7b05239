// Faults of the store that only native code can make: failing, short and hanging system calls,
// crowded keys, many threads, forks. Each test is named after its promise.
//
// Run: store_test DIRECTORY [NAME]. Prints the name of each test; ends at the first broken promise.
#include "store/store.h"

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <string>
#include <thread>
#include <vector>

#include "faulty_calls.h"
#include "rows.h"
#include "segment_tests.h"
#include "store/index.h"

using namespace torchcache::store;

namespace {

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

void rows_without_bytes_are_kept_in_either_codec() {
  const Rows rows(5, 1, 0);
  for (const bool zstd : {false, true}) {
    Options o = options();
    o.directory += zstd ? "/zstd" : "/raw";
    o.zstd = zstd;
    EXPECT(put(*Store::open(o), rows) == 5);
    uint8_t ok[5];
    Store::open(o)->read(rows.keys.data(), 5, kLayout, {{nullptr, 0}}, ok);
    for (uint8_t row : ok) EXPECT(row);
  }
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
  EXPECT(store->stats().damaged_rows == 0 && store->drain_warnings().empty());
}

// Runs the whole life of a store. Its n-th call fails; all from then on do, if the fault is
// `lasting`. How many calls were left to come.
long life_with_a_failed_call(long n, bool lasting) {
  const Rows early(20, 1), late(20, 2);
  std::filesystem::remove_all(directory);
  Options patient = options();
  patient.patience_seconds = 30;
  put(*Store::open(patient), early);
  Options used = patient;
  if (lasting) used.patience_seconds = used.retry_seconds = 0.005;
  system_calls = failing_calls();
  lasting_fault = lasting;
  calls_left = n;
  auto store = Store::open(used);
  right_rows(*store, early);
  put(*store, late);
  store->flush();
  const size_t read = right_rows(*store, late);
  const uint64_t dropped = store->stats().dropped_rows;
  EXPECT(lasting || read + dropped + store->stats().damaged_rows >= 20);
  store->close();
  const long left = calls_left;
  calls_left = -1;
  lasting_fault = false;
  system_calls = kReal;
  store = Store::open(patient);
  EXPECT(right_rows(*store, early) == 20);
  EXPECT(right_rows(*store, late) == 20 || dropped > 0 || lasting);
  EXPECT(put(*store, late) == 20 && right_rows(*store, late) == 20);
  store->flush();
  EXPECT(store->stats().dropped_rows == 0);
  return left;
}

long calls_of_a_life() { return 1000 - life_with_a_failed_call(1000, false); }

void a_call_that_fails_once_loses_no_row_that_was_not_counted() {
  EXPECT(calls_of_a_life() > 20);
  for (long n = 0; life_with_a_failed_call(n, false) < 0; ++n) continue;
}

void calls_that_fail_from_any_moment_on_cost_rows_but_are_never_a_wrong_one() {
  for (long n = 0, calls = calls_of_a_life(); n < calls; ++n) life_with_a_failed_call(n, true);
}

void cannot_write_for_a_while(Error cause) {
  std::filesystem::remove_all(directory);
  system_calls.pwritev = failing_pwritev;
  auto store = Store::open(options());
  const Rows first(10, 1), second(10, 2);
  put(*store, first);
  store->flush();
  failing = cause;
  put(*store, second);
  EXPECT(right_rows(*store, second) == 10);  // from memory
  EXPECT(right_rows(*store, first) == 10);
  std::vector<std::string> warnings;
  while (warnings.empty()) warnings = store->drain_warnings(), std::this_thread::yield();
  EXPECT(warnings.size() == 1 && warnings[0].find(error_text(cause)) != std::string::npos);
  EXPECT(warnings[0].find(directory) != std::string::npos);
  failing = 0;
  store->flush();
  EXPECT(store->drain_warnings().empty() && store->stats().dropped_rows == 0);
  store->close();
  store = Store::open(options());
  EXPECT(right_rows(*store, first) == 10 && right_rows(*store, second) == 10);
}

void a_full_disk_is_one_warning_and_writing_resumes() { cannot_write_for_a_while(ENOSPC); }
void a_spent_quota_is_one_warning_and_writing_resumes() { cannot_write_for_a_while(EDQUOT); }

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
  EXPECT(store->drain_warnings().size() == 2);  // the cause, and that rows are lost
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
  std::unique_lock lock(hanging_mutex);
  hanging.wait(lock, [] { return hung_threads == 1; });
  lock.unlock();
  store->close();
  lock.lock();
  hangs = false;
  hanging.notify_all();
  hanging.wait(lock, [] { return hung_threads == 0; });  // it ends by itself, without its store
}

void a_file_where_the_directory_should_be_is_one_warning() {
  std::fclose(std::fopen(directory.c_str(), "w"));
  auto store = Store::open(options());
  EXPECT(store->drain_warnings().empty());  // nothing to find there: only writing is worth a word
  EXPECT(put(*store, Rows(5, 1)) == 5 && put(*store, Rows(5, 2)) == 5);
  store->flush();
  const std::vector<std::string> warnings = store->drain_warnings();
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
  EXPECT(store->drain_warnings().size() == 1);
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

void rows_in_the_order_of_their_keys_are_found_like_any_others() {
  std::vector<Entry> rows;
  for (uint32_t i = 0; i < 30000; ++i) rows.push_back({digest(&i, 4).low, i, 0, i});
  for (uint32_t i = 0; i < 300; ++i) rows.push_back({rows[i].low, i + 1, 0, i + 30000});  // second copies
  const auto by_key = [](const Entry& a, const Entry& b) { return a.low < b.low; };
  for (const size_t ordered : {size_t{0}, size_t{1}, size_t{9000}, rows.size()}) {
    std::vector<Entry> some = rows;
    std::sort(some.begin(), some.begin() + ordered, by_key);  // then an index that comes second, then single rows
    std::sort(some.begin() + ordered, some.begin() + std::max<size_t>(ordered, 20000), by_key);
    Index index;
    index.add_block({});
    for (size_t first = 0; first < some.size(); first += 1000)
      index.insert(&some[first], std::min<size_t>(1000, some.size() - first), 0);
    EXPECT(index.keys() == 30000);
    for (const Entry& row : rows)
      EXPECT(index.find(row.low, [&](const Entry& e) { return e.row == row.row && e.check == row.check; }));
  }
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
    TEST(rows_without_bytes_are_kept_in_either_codec),
    TEST(short_and_interrupted_transfers_are_normal),
    TEST(a_call_that_fails_once_loses_no_row_that_was_not_counted),
    TEST(calls_that_fail_from_any_moment_on_cost_rows_but_are_never_a_wrong_one),
    TEST(a_full_disk_is_one_warning_and_writing_resumes),
    TEST(a_spent_quota_is_one_warning_and_writing_resumes),
    TEST(a_nearly_full_disk_gets_smaller_blocks),
    TEST(rows_are_dropped_and_counted_when_nothing_can_be_written),
    TEST(a_write_that_hangs_stops_nobody),
    TEST(a_file_where_the_directory_should_be_is_one_warning),
    TEST(a_deleted_directory_is_made_again),
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
    // The sanitizers' own allocator stays locked in a child that was forked beside threads.
    TEST(after_a_fork_both_sides_write_and_neither_touches_the_other),
    TEST(forks_at_any_moment_leave_a_store_that_works),
    TEST(rotation_and_reading_go_on_in_a_forked_child_of_a_rotated_store),
#endif
    TEST(many_threads_put_and_read_at_once),
    TEST(more_segments_than_may_be_open_are_all_read),
    TEST(rows_of_all_segments_are_found_while_they_rotate_and_afterwards),
    TEST(every_segment_but_the_last_is_sealed_with_an_index_and_no_larger_than_the_limit),
    TEST(a_block_larger_than_a_segment_may_be_is_one_by_itself),
    TEST(the_byte_limit_holds_across_rotations),
    TEST(a_look_at_many_sealed_segments_costs_a_listing_and_little_more),
    TEST(segments_that_grow_behind_an_index_are_looked_at_in_turn),
    TEST(what_another_process_flushed_is_found_by_the_next_look),
    TEST(a_listing_that_a_compaction_overtakes_costs_no_row),
    TEST(the_index_takes_at_most_40_bytes_a_row_and_finds_every_key),
    TEST(keys_that_crowd_together_are_found),
    TEST(rows_in_the_order_of_their_keys_are_found_like_any_others),
    TEST(a_dropped_entry_gives_way_to_the_next_copy),
};

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) return std::fprintf(stderr, "usage: store_test DIRECTORY [NAME]\n"), 2;
  for (const Test& test : kTests) {
    if (argc > 2 && std::string(argv[2]) != test.name) continue;
    std::printf("%s\n", test.name);
    std::fflush(stdout);
    directory = std::string(argv[1]) + "/" + test.name;
    test.run();
    system_calls = kReal;
    failing = 0;
  }
  return 0;
}
