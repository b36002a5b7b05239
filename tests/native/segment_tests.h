// Promises about the segments of a directory: that there may be many, that they rotate, that they come and go.
#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>

#include "faulty_calls.h"
#include "rows.h"
#include "store/admission.h"
#include "store/format/index_file.h"
#include "store/maintenance/compaction.h"

namespace torchcache::store {
namespace {

std::vector<SegmentId> segments_here() {
  std::vector<SegmentId> ids;
  EXPECT(list_segments(directory, &ids) == 0);
  return ids;
}

uint64_t bytes_here() {
  uint64_t bytes = 0;
  if (!std::filesystem::exists(directory)) return 0;
  for (const auto& entry : std::filesystem::directory_iterator(directory)) bytes += entry.file_size();
  return bytes;
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

Options rotating(uint64_t bytes) {
  Options o = options();
  o.rotate_bytes = bytes;
  return o;
}

// Blocks of ten rows.
void put_in_parts(Store& store, const Rows& rows) {
  for (size_t first = 0; first < rows.n(); first += 10) {
    const size_t n = std::min<size_t>(10, rows.n() - first);
    store.write(&rows.keys[first], n, kLayout, {{&rows.bytes[first * rows.row_bytes()], rows.row_bytes()}});
    store.flush();
  }
}

void rows_of_all_segments_are_found_while_they_rotate_and_afterwards() {
  const Rows rows(200, 1);
  auto store = Store::open(rotating(30000));
  put_in_parts(*store, rows);
  EXPECT(segments_here().size() == 10);  // two blocks of 10,000 bytes and more each
  EXPECT(right_rows(*store, rows) == 200 && store->stats().rows == 200);
  store->close();
  store = Store::open(options());
  EXPECT(right_rows(*store, rows) == 200 && store->stats().damaged_rows == 0);
}

void every_segment_but_the_last_is_sealed_with_an_index_and_no_larger_than_the_limit() {
  auto store = Store::open(rotating(30000));
  put_in_parts(*store, Rows(200, 1));
  size_t without = 0;
  for (const SegmentId& id : segments_here()) {
    without += !std::filesystem::exists(index_path(directory, id));
    EXPECT(std::filesystem::file_size(segment_path(directory, id)) <= 30000);
  }
  EXPECT(without == 1);
  store->close();
  for (const SegmentId& id : segments_here()) EXPECT(std::filesystem::exists(index_path(directory, id)));
}

void a_block_larger_than_a_segment_may_be_is_one_by_itself() {
  const Rows large(3, 1, 50000), small(10, 2);
  auto store = Store::open(rotating(30000));
  for (const Rows* rows : {&small, &large}) put(*store, *rows), store->flush();
  EXPECT(segments_here().size() == 2);
  store->close();
  store = Store::open(options());
  EXPECT(right_rows(*store, large) == 3 && right_rows(*store, small) == 10);
}

void fill(uint64_t rotate_bytes, uint64_t limit, const Rows& rows, void (*put_all)(Store&, const Rows&)) {
  Options o = rotating(rotate_bytes);
  o.max_bytes = limit;
  auto store = Store::open(o);
  put_all(*store, rows);
  store->flush();
  const Stats stats = store->stats();
  EXPECT(stats.full && found_rows(*store, rows) == stats.rows && stats.bytes_written <= limit);
  store->close();
  EXPECT(bytes_here() <= stats.bytes_written);
  std::filesystem::remove_all(directory);
}

void the_byte_limit_holds_across_rotations() {
  const Rows small(300, 1, 100), large(40, 2, 300000);
  for (const uint64_t rotate : {1, 3000, 20000})
    for (uint64_t limit = 500; limit < 40000; limit += 3733) fill(rotate, limit, small, put_in_parts);
  for (const uint64_t n : {15, 24, 37})  // of one put, in many segments
    fill(1 << 20, segment_cost() + n * row_cost(options(), sizeof kLayout - 1, 300000, n), large,
         [](Store& store, const Rows& rows) { put(store, rows); });
}

[[maybe_unused]] void rotation_and_reading_go_on_in_a_forked_child_of_a_rotated_store() {
  const Rows before(100, 1), of_child(100, 2);
  auto store = Store::open(rotating(30000));
  put_in_parts(*store, before);
  const pid_t child = fork();
  if (child == 0) {
    put_in_parts(*store, of_child);
    const bool right = right_rows(*store, before) == 100 && right_rows(*store, of_child) == 100;
    store->close();
    std::_Exit(right ? 0 : 1);
  }
  int status = -1;
  waitpid(child, &status, 0);
  EXPECT(status == 0);
  store->close();
  store = Store::open(options());
  EXPECT(right_rows(*store, before) == 100 && right_rows(*store, of_child) == 100);
}

std::atomic<int> listings{0};

DIR* counted_opendir(const char* path) {
  listings += path == directory;
  return kReal.opendir(path);
}

void look_once(Store& store) {
  const Rows never(1, uint64_t{1} << 40);
  for (const int before = listings; listings == before;) found_rows(store, never);
}

// A look comes when rows are missing and the last one is max(0.25 s, 100 times what it cost) ago.
void what_another_process_flushed_is_found_by_the_next_look() {
  auto store = Store::open(options()), other = Store::open(options());
  system_calls.opendir = counted_opendir;
  for (uint64_t seed = 1; seed < 4; ++seed) {
    const Rows rows(20, seed);
    put(*other, rows);
    other->flush();
    look_once(*store);
    EXPECT(found_rows(*store, rows) == 20 && right_rows(*store, rows) == 20);
  }
}

std::atomic<int> states{0};

int counted_lstat(const char* path, struct stat* out) {
  ++states;
  return kReal.lstat(path, out);
}

void a_look_at_many_sealed_segments_costs_a_listing_and_little_more() {
  for (uint64_t i = 0; i < 64; ++i) put(*Store::open(options()), Rows(2, i));
  auto store = Store::open(options());
  system_calls.opendir = counted_opendir;
  system_calls.lstat = counted_lstat;
  look_once(*store);
  EXPECT(states <= 2 * 64 / 32);
}

void segments_that_grow_behind_an_index_are_looked_at_in_turn() {
  constexpr uint64_t kStores = 32;
  std::vector<std::shared_ptr<Store>> growing;
  for (uint64_t i = 0; i < kStores; ++i) {
    growing.push_back(Store::open(options()));
    put(*growing[i], Rows(2, i));
    growing[i]->flush();
  }
  for (const SegmentId& id : segments_here()) EXPECT(write_index(directory, id) == 0);
  auto store = Store::open(options());
  for (uint64_t i = 0; i < kStores; ++i) put(*growing[i], Rows(2, kStores + i)), growing[i]->flush();
  system_calls.opendir = counted_opendir;
  for (int n = 0; n < 3; ++n) look_once(*store);
  size_t found = 0;
  for (uint64_t i = 0; i < kStores; ++i) found += found_rows(*store, Rows(2, kStores + i));
  EXPECT(found >= 3 * 2);
}

void compact_all() {
  Compaction compaction(directory);
  for (const SegmentId& id : segments_here()) EXPECT(compaction.add_segment(id));
  compaction.finish();
}

std::atomic<int> torn_listings{0};

// A listing that a whole compaction overtakes: it has passed the place of the new segment before that came, and comes
// to the places of the old ones when they are gone.
DIR* opendir_beside_a_compaction(const char* path) {
  if (path != directory || torn_listings <= 0) return kReal.opendir(path);
  --torn_listings;
  system_calls.opendir = kReal.opendir;
  compact_all();
  system_calls.opendir = opendir_beside_a_compaction;
  const std::string nothing = directory + "/nothing";
  std::filesystem::create_directory(nothing);
  return kReal.opendir(nothing.c_str());
}

void a_listing_that_a_compaction_overtakes_costs_no_row() {
  const Rows first(20, 1), second(20, 2), never(1, 3);
  for (const Rows* rows : {&first, &second}) put(*Store::open(options()), *rows);
  auto store = Store::open(options());
  EXPECT(right_rows(*store, first) == 20);
  system_calls.opendir = opendir_beside_a_compaction;
  for (int time = 0; time < 2; ++time) {
    torn_listings = 1;
    while (torn_listings > 0) found_rows(*store, never);  // a miss looks, at most every quarter of a second
  }
  EXPECT(segments_here().size() == 1);
  EXPECT(found_rows(*store, first) == 20 && found_rows(*store, second) == 20);
  EXPECT(right_rows(*store, first) == 20 && right_rows(*store, second) == 20);
  EXPECT(store->stats().damaged_rows == 0 && store->drain_warnings().empty());
}

}  // namespace
}  // namespace torchcache::store
