// Segments of other processes only grow, so a refresh costs a listing and what is new in each.
#include "store/refresh.h"

#include <algorithm>
#include <cerrno>
#include <new>

#include "store/format/bytes.h"
#include "store/format/index_file.h"

namespace torchcache::store {
namespace {

constexpr int kMaxListings = 8;
constexpr uint32_t kSealedEvery = 32;  // refreshes: anyone may write an index, also of a segment that grows
constexpr auto kMinPause = std::chrono::milliseconds(250);
constexpr auto kSettled = std::chrono::seconds(60);  // later, nobody is still writing these bytes

std::string path_of(const State& state, const SegmentId& id) { return segment_path(state.options.directory, id); }

// ---- the set of segments

uint32_t number_of(State& state, const SegmentId& id) {
  core::MutexLock lock(state.mutex);
  const auto number = state.segments.find(id);
  return number ? *number : state.segments.add(id);
}

bool lacks_a_segment(State& state, const std::vector<SegmentId>& listed) {
  core::MutexLock lock(state.mutex);
  return !state.segments.missing_from(listed).empty();
}

void remove_missing(State& state, const std::vector<SegmentId>& listed) {
  core::MutexLock lock(state.mutex);
  for (const uint32_t number : state.segments.missing_from(listed)) state.remove_segment(number);
}

Error list_sorted(const State& state, std::vector<SegmentId>* ids) {
  ids->clear();
  const Error error = list_segments(state.options.directory, ids);
  std::sort(ids->begin(), ids->end());
  return error;
}

// A listing during a compaction may miss the new segment, which came after it had begun, and over the old ones,
// which went before it ended. So one that lacks a segment is made again, until two in a row agree.
Error list_all(State& state, std::vector<SegmentId>* ids) {
  Error error = list_sorted(state, ids);
  for (int n = 1; n < kMaxListings && error == 0 && lacks_a_segment(state, *ids); ++n) {
    const std::vector<SegmentId> before = *ids;
    error = list_sorted(state, ids);
    if (*ids == before) break;
  }
  return error;
}

// ---- one segment

void add_block(State& state, uint32_t number, const BlockHeader& header, const uint8_t* table) {
  const Table parts = split_table(header, table);
  const std::string layout = layout_of(header, table);
  core::MutexLock lock(state.mutex);
  if (state.closed) return;
  Block block = to_block(header, number, state.index.intern(layout));
  const uint32_t block_number = state.index.add_block(block);
  for (uint32_t row = 0; row < header.rows; ++row)
    state.index.insert({parts.key(row).low, parts.check(row), block_number, row});
}

// Scans from `position`; adds the blocks that it finds. Where a later scan goes on.
uint64_t scan(State& state, uint32_t number, const File& file, const SegmentId& id, uint64_t position, uint64_t end,
              std::vector<Hole>* holes) {
  Scanner scanner(file, id, position, end);
  while (scanner.next()) add_block(state, number, scanner.header(), scanner.table());
  for (const Hole& hole : scanner.holes()) {
    if (!holes->empty() && holes->back().end == hole.begin)
      holes->back().end = hole.end;
    else
      holes->push_back(hole);
  }
  return scanner.position();
}

// Scans again what was not readable before: only a header that is right now makes it worth it.
std::vector<Hole> scan_holes(State& state, uint32_t number, const File& file, const SegmentId& id,
                             const std::vector<Hole>& holes, uint64_t size) {
  std::vector<Hole> left;
  for (const Hole& hole : holes) {
    uint8_t bytes[kHeaderBytes];
    BlockHeader header;
    if (file.read(bytes, kHeaderBytes, hole.begin) != 0 || !decode_block_header(bytes, id, hole.begin, &header)) {
      left.push_back(hole);
      continue;
    }
    const uint64_t end = std::min(size, std::max(hole.end, header.end()));
    const uint64_t reached = scan(state, number, file, id, hole.begin, end, &left);
    if (reached < hole.end) left.push_back({reached, hole.end});
  }
  return left;
}

// Where the scan of the rest begins: nothing is covered if there is no index or it is not right.
uint64_t read_index(State& state, uint32_t number, const SegmentId& id, uint64_t size) {
  IndexFile file;
  if (!file.open(state.options.directory, id, size)) return kHeaderBytes;
  uint32_t first_block = 0;
  {
    core::MutexLock lock(state.mutex);
    if (state.closed) return kHeaderBytes;
    state.index.reserve(file.rows());
    first_block = state.index.blocks();
    for (const auto& block : file.blocks())
      state.index.add_block(to_block(block.header, number, state.index.intern(file.layouts()[block.layout])));
  }
  const bool whole = file.read([&](const std::vector<Entry>& entries) {
    core::MutexLock lock(state.mutex);
    if (state.closed) return;
    state.index.insert(entries.data(), entries.size(), first_block);
  });
  return whole ? std::max(kHeaderBytes, file.covered()) : kHeaderBytes;
}

void count_damage(State& state, Segment& segment) TORCHCACHE_REQUIRES(state.mutex) {
  if (segment.holes.empty()) return;
  state.damaged_rows += segment.holes.size();
  segment.holes.clear();
  state.warn_of_damage(segment);
}

bool has_index(const State& state, const SegmentId& id) {
  FileState index;
  return path_state(index_path(state.options.directory, id), &index) == 0;
}

// Ends the refresh, also after an exception.
class RefreshScope {
 public:
  explicit RefreshScope(State& state) : state_(state), begin_(Clock::now()) {}
  ~RefreshScope() {
    core::MutexLock lock(state_.mutex);
    const Clock::time_point now = Clock::now();
    const Clock::duration cost = now - begin_ - first_scans_;
    state_.refreshing = false;
    state_.next_refresh = now + std::max<Clock::duration>(kMinPause, 100 * cost);
  }
  // A cost that each segment causes once must not make refreshes rarer.
  void leave_out(Clock::duration first_scan) { first_scans_ += first_scan; }

 private:
  State& state_;
  const Clock::time_point begin_;
  Clock::duration first_scans_{0};
};

void warn_of(State& state, const SegmentId& id, Error error) {
  core::MutexLock lock(state.mutex);
  state.warn("cannot read " + path_of(state, id) + ": " + error_text(error));
}

// Scans what is new in a segment, of which `record` is a copy, and records where the scan ended.
void scan_new_blocks(State& state, uint32_t number, const File& file, const FileState& now, Segment record) {
  if (!record.scanned) {
    record.position = read_index(state, number, record.id, now.size);
    record.sealed = record.position > kHeaderBytes;
  }
  std::vector<Hole> holes = scan_holes(state, number, file, record.id, record.holes, now.size);
  record.position = scan(state, number, file, record.id, record.position, now.size, &holes);
  const bool sealed = !holes.empty() && has_index(state, record.id);
  core::MutexLock lock(state.mutex);
  Segment& segment = state.segments[number];
  if (!record.scanned || !(segment.state == now)) segment.changed = Clock::now();
  segment.scanned = true;
  segment.sealed = record.sealed;
  segment.state = now;
  segment.position = record.position;
  segment.holes = std::move(holes);
  if (sealed || Clock::now() - segment.changed > kSettled) count_damage(state, segment);
}

// Whether this refresh may pass over a segment.
bool may_skip(const State& state, uint32_t number) TORCHCACHE_REQUIRES(state.mutex) {
  const Segment& segment = state.segments[number];
  const bool sealed = segment.sealed && segment.holes.empty();
  return segment.own || (sealed && (number + state.refreshes) % kSealedEvery != 0);
}

// Scans a segment if its file has changed since the last scan; `record` is a copy of what the registry has on it.
Error refresh_changed(State& state, uint32_t number, const Segment& record) {
  FileState now;
  if (const Error error = path_state(path_of(state, record.id), &now)) return error;
  if (record.scanned && now == record.state && record.holes.empty()) {
    const bool sealed = record.sealed || has_index(state, record.id);
    core::MutexLock lock(state.mutex);
    state.segments[number].sealed = sealed;
    return 0;
  }
  Error error = 0;
  const auto file = open_segment_file(state, number, &error);
  if (file != nullptr) error = file->state(&now);
  if (error != 0) return error;
  try {
    scan_new_blocks(state, number, *file, now, record);
  } catch (const std::bad_alloc&) {  // what was read of it stays, the rest is read when there is memory
    return ENOMEM;
  }
  return 0;
}

void refresh_segment(State& state, const SegmentId& id, RefreshScope* scope) {
  const Clock::time_point begin = Clock::now();
  const uint32_t number = number_of(state, id);
  Segment record;
  {
    core::MutexLock lock(state.mutex);
    if (may_skip(state, number)) return;
    record = state.segments[number];
  }
  const Error error = refresh_changed(state, number, record);
  if (error != 0 && !is_gone(error)) warn_of(state, id, error);
  if (!record.scanned && (error == 0 || error == ENOMEM)) scope->leave_out(Clock::now() - begin);
}

void refresh_all(State& state, RefreshScope* scope) {
  std::vector<SegmentId> ids;
  const Error error = list_all(state, &ids);
  if (error == 0 || error == ENOENT || error == ENOTDIR) {  // not there: only writing would say so
    for (const SegmentId& id : ids) refresh_segment(state, id, scope);
    remove_missing(state, ids);
    return;
  }
  core::MutexLock lock(state.mutex);
  state.warn("cannot read the cache directory", error);
}

}  // namespace

bool refresh_is_due(const State& state) {
  return !state.refreshing && !state.closed && Clock::now() >= state.next_refresh;
}

bool refresh(State& state) {
  {
    core::MutexLock lock(state.mutex);
    if (state.refreshing || state.closed) return false;
    state.refreshing = true;
    ++state.refreshes;
  }
  RefreshScope scope(state);
  refresh_all(state, &scope);
  return true;
}

}  // namespace torchcache::store
