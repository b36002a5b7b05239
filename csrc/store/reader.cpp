// Plan under the mutex, read without it, verify, and drop what turned out to be damaged.
#include "store/reader.h"

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "store/format/compression.h"
#include "store/os/pages.h"
#include "store/refresh.h"

namespace torchcache::store {
namespace {

constexpr uint64_t kRunBytes = 1 << 20;      // neighbours that are read as one
constexpr uint64_t kGroupBytes = 256 << 10;  // runs that are read before they are verified
constexpr uint64_t kPopulateBytes = 64 << 10;

// A row that is to be read from a segment.
struct RowRead {
  size_t i = 0;  // of the caller's keys
  Entry entry{};
  Block block;
  uint64_t offset = 0;  // in the segment
  uint64_t length = 0;  // as stored
  Error error = 0;
};

struct QueuedRow {
  size_t i = 0;
  Queue::Row row;
};

class RowReader {
 public:
  RowReader(State& state, const Digest* keys, const std::string& layout, const std::vector<Leaf>& out, uint8_t* ok)
      : state_(state), keys_(keys), layout_(layout), out_(out), ok_(ok) {
    for (const Leaf& leaf : out) row_bytes_ += leaf.row_bytes;
  }
  void run(size_t n);

 private:
  void plan(const std::vector<size_t>& rows);
  void plan_row(uint32_t layout, size_t i) TORCHCACHE_REQUIRES(state_.mutex);
  void locate(RowRead* read);
  Error read_row_ends(const RowRead& read, std::vector<uint32_t>* ends);
  size_t run_end(size_t first) const;
  size_t group_end(size_t begin);
  void read_group(size_t begin, size_t end);
  void read_run(const File& file, size_t first, size_t last, Transfer transfer);
  bool verify_and_copy(const RowRead& read, const uint8_t* stored);
  void copy_to_leaves(const uint8_t* row, size_t i);
  void handle_unread(const RowRead& read);

  // Whether the bytes in the file are the bytes of the output.
  bool is_direct(const RowRead& read) const { return out_.size() == 1 && read.block.codec == Codec::kRaw; }

  State& state_;
  const Digest* const keys_;
  const std::string& layout_;
  const std::vector<Leaf>& out_;
  uint8_t* const ok_;
  uint64_t row_bytes_ = 0;
  std::vector<QueuedRow> queued_;
  std::vector<RowRead> reads_;
  std::vector<size_t> retry_;  // rows that another copy may still give
  std::vector<size_t> runs_;   // first reads of the runs of a group
  std::vector<Transfer> transfers_;
  std::vector<uint8_t> stored_, row_;
  bool file_gone_ = false;
  bool refreshed_ = false;  // for files that were gone: once is enough
};

void RowReader::run(size_t n) {
  std::vector<size_t> rows(n);
  for (size_t i = 0; i < n; ++i) rows[i] = i;
  for (; !rows.empty(); rows.swap(retry_)) {
    retry_.clear();
    plan(rows);
    for (const QueuedRow& queued : queued_) {
      copy_to_leaves(queued.row.batch->row(queued.row.row), queued.i);
      ok_[queued.i] = 1;
    }
    for (size_t begin = 0, end = 0; begin < reads_.size(); begin = end) {
      end = group_end(begin);
      read_group(begin, end);
    }
    if (!file_gone_ || refreshed_) continue;
    if (!refresh(state_)) return;  // another thread is at it: these are misses, for this time
    refreshed_ = true;
  }
}

void RowReader::plan(const std::vector<size_t>& rows) {
  queued_.clear();
  reads_.clear();
  reads_.reserve(rows.size());
  {
    core::MutexLock lock(state_.mutex);
    const uint32_t layout = state_.index.layout_number(layout_);
    if (layout == Index::kNone) return;
    for (size_t i : rows) plan_row(layout, i);
  }
  for (RowRead& read : reads_)
    if (read.block.codec == Codec::kZstd) locate(&read);
}

void RowReader::plan_row(uint32_t layout, size_t i) {
  Queue::Row row = state_.queue.find(keys_[i]);
  if (row.batch != nullptr && row.batch->layout == layout && row.batch->row_bytes == row_bytes_) {
    queued_.push_back({i, std::move(row)});
    return;
  }
  const Entry* entry = state_.index.find_by_block(
      keys_[i].low, [&](const Block& block) { return block.layout == layout && block.row_bytes == row_bytes_; });
  if (entry == nullptr) return;
  RowRead read;
  read.i = i;
  read.entry = *entry;
  read.block = state_.index.block(entry->block);
  read.offset = read.block.payload_offset + entry->row * row_bytes_;
  read.length = row_bytes_;
  reads_.push_back(read);
}

// Where a row of a zstd block stands.
void RowReader::locate(RowRead* read) {
  std::shared_ptr<const std::vector<uint32_t>> ends;
  {
    core::MutexLock lock(state_.mutex);
    const auto cached = state_.row_ends.find(read->entry.block);
    if (cached != state_.row_ends.end()) ends = cached->second;
  }
  if (ends == nullptr) {
    auto new_ends = std::make_shared<std::vector<uint32_t>>();
    read->error = read_row_ends(*read, new_ends.get());
    if (read->error != 0) return;
    core::MutexLock lock(state_.mutex);
    state_.row_ends[read->entry.block] = ends = new_ends;
  }
  const uint32_t row = read->entry.row;
  const uint32_t begin = row == 0 ? 0 : (*ends)[row - 1], end = (*ends)[row];
  if (begin > end || end > read->block.payload_bytes || end - begin > row_bytes_)
    read->error = kShortFile;  // the lengths are not what they were when they were checked
  read->offset = read->block.payload_offset + begin;
  read->length = end - begin;
}

Error RowReader::read_row_ends(const RowRead& read, std::vector<uint32_t>* ends) {
  const Block& block = read.block;
  Error error = 0;
  const auto file = open_segment_file(state_, block.segment, &error);
  if (file == nullptr) return error;
  const uint64_t head = kHeaderBytes + table_bytes(block.codec, block.rows, layout_.size());
  const uint64_t lengths = lengths_offset(block.rows, layout_.size());
  ends->resize(block.rows);
  error = file->read(ends->data(), 4 * ends->size(), block.payload_offset - head + lengths);
  for (size_t row = 1; row < ends->size(); ++row) (*ends)[row] += (*ends)[row - 1];
  return error;
}

// One behind the last read that can be read together with the first: neighbours in the file, and
// in the output if they are read straight into it.
size_t RowReader::run_end(size_t first) const {
  uint64_t bytes = reads_[first].length;
  size_t last = first + 1;
  for (; last < reads_.size(); ++last) {
    const RowRead &before = reads_[last - 1], &read = reads_[last];
    bytes += read.length;
    if (read.entry.block != before.entry.block || read.error != 0 || before.error != 0) break;
    if (read.offset != before.offset + before.length || bytes > kRunBytes) break;
    if (is_direct(read) && read.i != before.i + 1) break;
  }
  return last;
}

// Plans the reads of some runs of one segment: runs_ and transfers_.
size_t RowReader::group_end(size_t begin) {
  runs_.clear();
  transfers_.clear();
  runs_.reserve(reads_.size());
  transfers_.reserve(reads_.size());
  const uint32_t segment = reads_[begin].block.segment;
  uint64_t bytes = 0;
  size_t first = begin;
  while (first < reads_.size() && bytes < kGroupBytes && reads_[first].block.segment == segment) {
    const size_t last = run_end(first);
    const RowRead& front = reads_[first];
    const uint64_t size = reads_[last - 1].offset + reads_[last - 1].length - front.offset;
    runs_.push_back(first);
    transfers_.push_back({nullptr, front.error == 0 ? size : 0, front.offset});
    bytes += transfers_.back().size;
    first = last;
  }
  return first;
}

void RowReader::read_group(size_t begin, size_t end) {
  uint64_t size = 0;
  for (size_t run = 0; run < runs_.size(); ++run) size += is_direct(reads_[runs_[run]]) ? 0 : transfers_[run].size;
  if (stored_.size() < size) stored_.resize(size);
  uint8_t* stored = stored_.data();
  for (size_t run = 0; run < runs_.size(); ++run) {
    const RowRead& front = reads_[runs_[run]];
    transfers_[run].out = is_direct(front) ? out_[0].data + front.i * row_bytes_ : stored;
    stored += is_direct(front) ? 0 : transfers_[run].size;
  }
  Error error = 0;
  const auto file = open_segment_file(state_, reads_[begin].block.segment, &error);
  if (file != nullptr) file->read(transfers_.data(), transfers_.size());
  for (size_t run = 0; run < runs_.size(); ++run) {
    const size_t last = run + 1 < runs_.size() ? runs_[run + 1] : end;
    if (file != nullptr)
      read_run(*file, runs_[run], last, transfers_[run]);
    else
      for (size_t p = runs_[run]; p < last; ++p) reads_[p].error = error;
  }
  for (size_t p = begin; p < end; ++p)
    if (!ok_[reads_[p].i]) handle_unread(reads_[p]);
}

// Hands out what was read; rows that could not be read together are read one by one.
void RowReader::read_run(const File& file, size_t first, size_t last, Transfer run) {
  for (size_t p = first; p < last; ++p) {
    RowRead& read = reads_[p];
    uint8_t* const stored = run.out + (read.offset - reads_[first].offset);
    if (read.error == 0) read.error = run.error;
    if (run.error != 0 && last - first > 1) read.error = file.read(stored, read.length, read.offset);
    if (read.error == 0) ok_[read.i] = verify_and_copy(read, stored);
  }
}

// Verifies one row and hands it out.
bool RowReader::verify_and_copy(const RowRead& read, const uint8_t* stored) {
  if (row_check(digest(stored, read.length), keys_[read.i]) != read.entry.check) return false;
  if (is_direct(read)) return true;
  if (read.block.codec == Codec::kZstd) {
    uint8_t* row = out_.size() == 1 ? out_[0].data + read.i * row_bytes_ : nullptr;
    if (row == nullptr) row_.resize(row_bytes_);
    if (!decompress_row(stored, read.length, row ? row : row_.data(), row_bytes_)) return false;
    if (row != nullptr) return true;
    stored = row_.data();
  }
  copy_to_leaves(stored, read.i);
  return true;
}

void RowReader::copy_to_leaves(const uint8_t* row, size_t i) {
  for (const Leaf& leaf : out_) {
    if (leaf.row_bytes > 0) memcpy(leaf.data + i * leaf.row_bytes, row, leaf.row_bytes);
    row += leaf.row_bytes;
  }
}

// Decides about a row that was not read: whether to try again, and whether this copy is lost.
void RowReader::handle_unread(const RowRead& read) {
  const Error error = read.error;
  if (error == EMFILE || error == ENFILE || error == ENOMEM) return;  // a miss, for this time
  core::MutexLock lock(state_.mutex);
  if (state_.closed) return;
  retry_.push_back(read.i);
  const bool gone = is_gone(error);
  if (gone && !refreshed_) {
    state_.segments.close_file(read.block.segment);
    file_gone_ = true;
    return;
  }
  const bool dropped = state_.index.drop(read.entry.low, read.entry.block, read.entry.row);
  if (!dropped || gone) return;
  ++state_.damaged_rows;
  state_.warn_of_damage(state_.segments[read.block.segment]);
}

// Fresh outputs cost more in page faults than in copies: huge pages, or all pages at once, halve it.
void prepare_pages(const Leaf& leaf, size_t n) {
  const uint64_t size = n * leaf.row_bytes;
  if (size >= kHugeBytes)
    use_huge_pages(leaf.data, size);
  else if (size >= kPopulateBytes)
    touch_pages(leaf.data, size);
}

}  // namespace

void read_rows(State& state, const Digest* keys, size_t n, const std::string& layout, const std::vector<Leaf>& out,
               uint8_t* ok) {
  memset(ok, 0, n);
  for (const Leaf& leaf : out) prepare_pages(leaf, n);
  RowReader(state, keys, layout, out, ok).run(n);
}

}  // namespace torchcache::store
