// Segments of other processes only grow, so a look costs a listing and what is new in each.
#include "store/look.h"

#include <algorithm>
#include <cerrno>
#include <new>

#include "store/bytes.h"
#include "store/index_file.h"

namespace torchcache::store {
namespace {

constexpr size_t kMostOpenFiles = 128;
constexpr int kMostListings = 8;
constexpr uint32_t kSealedEvery = 32;  // looks: anyone may write an index, also of a segment that grows
constexpr auto kShortestPause = std::chrono::milliseconds(250);
constexpr auto kSettled = std::chrono::seconds(60);  // later, nobody is still writing these bytes

std::string at_place(const State& state, const SegmentId& id) { return segment_path(state.options.directory, id); }

// ---- the set of segments

uint32_t number_of(State& state, const SegmentId& id) {
  std::lock_guard lock(state.mutex);
  const auto known = state.numbers.find(id);
  return known != state.numbers.end() ? known->second : add_segment(state, id);
}

// Numbers of segments that were in the directory and are not in this sorted listing. The caller holds the mutex.
std::vector<uint32_t> missing_from(const State& state, const std::vector<SegmentId>& listed) {
  std::vector<uint32_t> missing;
  for (uint32_t n = 0; n < state.segments.size(); ++n) {
    const Segment& segment = state.segments[n];
    if (segment.own || segment.gone) continue;
    if (!std::binary_search(listed.begin(), listed.end(), segment.id)) missing.push_back(n);
  }
  return missing;
}

bool lacks_a_segment(State& state, const std::vector<SegmentId>& listed) {
  std::lock_guard lock(state.mutex);
  return !missing_from(state, listed).empty();
}

void forget_missing(State& state, const std::vector<SegmentId>& listed) {
  std::lock_guard lock(state.mutex);
  for (const uint32_t number : missing_from(state, listed)) remove_segment(state, number);
}

Error list_sorted(const State& state, std::vector<SegmentId>* ids) {
  ids->clear();
  const Error error = list_segments(state.options.directory, ids);
  std::sort(ids->begin(), ids->end());
  return error;
}

// A listing beside a compaction may pass over the new segment, which came after it had begun, and over the old ones,
// which went before it ended. So one that lacks a segment is made again, until two in a row agree.
Error list_all(State& state, std::vector<SegmentId>* ids) {
  Error error = list_sorted(state, ids);
  for (int n = 1; n < kMostListings && error == 0 && lacks_a_segment(state, *ids); ++n) {
    const std::vector<SegmentId> before = *ids;
    error = list_sorted(state, ids);
    if (*ids == before) break;
  }
  return error;
}

// ---- one segment

void add_block(State& state, uint32_t number, const BlockHeader& header, const uint8_t* table) {
  const Table parts = split_table(header, table);
  const std::string layout(reinterpret_cast<const char*>(parts.layout), header.layout_bytes);
  std::lock_guard lock(state.mutex);
  if (state.closed) return;
  Block block = to_block(header, number, state.index.intern(layout));
  const uint32_t block_number = state.index.add_block(block);
  for (uint32_t row = 0; row < header.rows; ++row)
    state.index.insert(
        {from_canonical(parts.keys + 16 * row).low, load<uint64_t>(parts.checks + 8 * row), block_number, row});
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

// Looks again at what was not readable before: only a header that is right now makes it worth it.
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
    std::lock_guard lock(state.mutex);
    if (state.closed) return kHeaderBytes;
    state.index.reserve(file.rows());
    first_block = state.index.blocks();
    for (const auto& block : file.blocks())
      state.index.add_block(to_block(block.header, number, state.index.intern(file.layouts()[block.layout])));
  }
  const bool whole = file.read([&](const std::vector<Entry>& entries) {
    std::lock_guard lock(state.mutex);
    if (state.closed) return;
    state.index.insert(entries.data(), entries.size(), first_block);
  });
  return whole ? std::max(kHeaderBytes, file.covered()) : kHeaderBytes;
}

void count_damage(State& state, Segment& segment) {
  if (segment.holes.empty()) return;
  state.damaged_rows += segment.holes.size();
  segment.holes.clear();
  state.warn_of_damage(segment);
}

bool has_index(const State& state, const SegmentId& id) {
  FileState index;
  return path_state(index_path(state.options.directory, id), &index) == 0;
}

// Ends the look, also after an exception.
class Looking {
 public:
  explicit Looking(State& state) : state_(state), begin_(Clock::now()) {}
  ~Looking() {
    std::lock_guard lock(state_.mutex);
    const Clock::time_point now = Clock::now();
    const Clock::duration cost = now - begin_ - first_scans_;
    state_.looking = false;
    state_.next_look = now + std::max<Clock::duration>(kShortestPause, 100 * cost);
  }
  // What a segment takes once is no reason to look less often.
  void leave_out(Clock::duration first_scan) { first_scans_ += first_scan; }

 private:
  State& state_;
  const Clock::time_point begin_;
  Clock::duration first_scans_{0};
};

void warn_of(State& state, const SegmentId& id, Error error) {
  std::lock_guard lock(state.mutex);
  state.warn("cannot read " + at_place(state, id) + ": " + error_text(error));
}

// Reads what is new in a segment and puts down where it stopped.
void scan_news(State& state, uint32_t number, const File& file, const FileState& now, Segment known) {
  if (!known.scanned) {
    known.position = read_index(state, number, known.id, now.size);
    known.sealed = known.position > kHeaderBytes;
  }
  std::vector<Hole> holes = scan_holes(state, number, file, known.id, known.holes, now.size);
  known.position = scan(state, number, file, known.id, known.position, now.size, &holes);
  const bool sealed = !holes.empty() && has_index(state, known.id);
  std::lock_guard lock(state.mutex);
  Segment& segment = state.segments[number];
  if (!known.scanned || !(segment.seen == now)) segment.changed = Clock::now();
  segment.scanned = true;
  segment.sealed = known.sealed;
  segment.seen = now;
  segment.position = known.position;
  segment.holes = std::move(holes);
  if (sealed || Clock::now() - segment.changed > kSettled) count_damage(state, segment);
}

// Whether nothing new is to be expected of a segment this time. The caller holds the mutex.
bool rests(const State& state, uint32_t number) {
  const Segment& segment = state.segments[number];
  const bool sealed = segment.sealed && segment.holes.empty();
  return segment.own || (sealed && (number + state.looks) % kSealedEvery != 0);
}

void look_at(State& state, const SegmentId& id, Looking* looking) {
  const Clock::time_point begin = Clock::now();
  const uint32_t number = number_of(state, id);
  Segment known;
  {
    std::lock_guard lock(state.mutex);
    if (rests(state, number)) return;
    known = state.segments[number];
  }
  FileState now;
  Error error = path_state(at_place(state, id), &now);
  if (error == 0 && known.scanned && now == known.seen && known.holes.empty()) {
    const bool sealed = known.sealed || has_index(state, id);
    std::lock_guard lock(state.mutex);
    state.segments[number].sealed = sealed;
    return;
  }
  const auto file = error == 0 ? segment_file(state, number, &error) : nullptr;
  if (file != nullptr) error = file->state(&now);
  if (error != 0) {
    if (!is_gone(error)) warn_of(state, id, error);
    return;
  }
  try {
    scan_news(state, number, *file, now, known);
  } catch (const std::bad_alloc&) {  // what was read of it stays, the rest is read when there is memory
    warn_of(state, id, ENOMEM);
  }
  if (!known.scanned) looking->leave_out(Clock::now() - begin);
}

void look_at_all(State& state, Looking* looking) {
  std::vector<SegmentId> ids;
  const Error error = list_all(state, &ids);
  if (error == 0 || error == ENOENT || error == ENOTDIR) {  // not there: only writing would say so
    for (const SegmentId& id : ids) look_at(state, id, looking);
    forget_missing(state, ids);
    return;
  }
  std::lock_guard lock(state.mutex);
  state.warn("cannot read the cache directory", error);
}

void close_oldest(State& state) {
  Segment* oldest = nullptr;
  for (Segment& segment : state.segments)
    if (segment.file != nullptr && (oldest == nullptr || segment.used < oldest->used)) oldest = &segment;
  if (oldest != nullptr) forget_file(state, *oldest);
}

}  // namespace

bool look_is_due(const State& state) { return !state.looking && !state.closed && Clock::now() >= state.next_look; }

bool look(State& state) {
  {
    std::lock_guard lock(state.mutex);
    if (state.looking || state.closed) return false;
    state.looking = true;
    ++state.looks;
  }
  Looking looking(state);
  look_at_all(state, &looking);
  return true;
}

uint32_t add_segment(State& state, const SegmentId& id) {
  const uint32_t number = static_cast<uint32_t>(state.segments.size());
  Segment segment;
  segment.id = id;
  segment.changed = Clock::now();
  state.segments.push_back(std::move(segment));
  state.numbers[id] = number;
  return number;
}

void remove_segment(State& state, uint32_t number) {
  Segment& segment = state.segments[number];
  segment.gone = true;
  state.numbers.erase(segment.id);
  forget_file(state, segment);
  state.index.drop_segment(number);
}

void forget_file(State& state, Segment& segment) {
  if (segment.file == nullptr) return;
  segment.file.reset();
  --state.open_files;
}

std::shared_ptr<File> segment_file(State& state, uint32_t number, Error* error) {
  std::string path;
  *error = 0;
  {
    std::lock_guard lock(state.mutex);
    Segment& segment = state.segments[number];
    segment.used = ++state.uses;
    if (segment.file != nullptr) return segment.file;
    path = at_place(state, segment.id);
  }
  auto file = File::open(path, state.options.mmap, error);
  std::lock_guard lock(state.mutex);
  if (file == nullptr && (*error == EMFILE || *error == ENFILE)) {
    for (Segment& segment : state.segments) forget_file(state, segment);
    file = File::open(path, state.options.mmap, error);
  }
  Segment& segment = state.segments[number];
  if (file == nullptr || segment.file != nullptr || segment.gone || state.closed) return file;
  if (state.open_files >= kMostOpenFiles) close_oldest(state);
  segment.file = file;
  ++state.open_files;
  return file;
}

}  // namespace torchcache::store
