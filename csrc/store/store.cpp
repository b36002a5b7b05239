// The facade: admission, the first write, flushing, forks.
#include "store/store.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <memory_resource>
#include <new>
#include <stdexcept>
#include <unordered_set>
#include <utility>

#include "store/admission.h"
#include "store/reader.h"
#include "store/refresh.h"
#include "store/state.h"
#include "store/writer.h"

namespace torchcache::store {

struct Store::Chunk {
  const Digest* keys;
  size_t n;
  const std::string& layout;
  const std::vector<ConstLeaf>& leaves;
  size_t first;  // row of the leaves that keys[0] belongs to
  uint64_t row_bytes;
};

namespace {

constexpr size_t kPrefetchedKeys = 16;  // keys whose table entries are fetched together

std::string out_of_range(const char* name, int64_t low, int64_t high, int64_t value) {
  return std::string(name) + " must be between " + std::to_string(low) + " and " + std::to_string(high) + ", got " +
         std::to_string(value);
}

Options validated(Options options) {
  constexpr int kMaxThreads = 1024;
  if (options.directory.empty()) throw std::invalid_argument("directory must name the directory of the store, got ''");
  if (options.zstd_threads < 1 || options.zstd_threads > kMaxThreads)
    throw std::invalid_argument(out_of_range("zstd_threads", 1, kMaxThreads, options.zstd_threads));
  if (options.zstd_level < min_zstd_level() || options.zstd_level > max_zstd_level())
    throw std::invalid_argument(out_of_range("zstd_level", min_zstd_level(), max_zstd_level(), options.zstd_level));
  if (options.rotate_bytes < 1 || options.rotate_bytes > kRotateBytes)
    throw std::invalid_argument(
        out_of_range("rotate_bytes", 1, kRotateBytes, static_cast<int64_t>(options.rotate_bytes)));
  std::error_code error;  // then the path stays relative
  const auto absolute = std::filesystem::absolute(options.directory, error);
  if (!error) options.directory = absolute.lexically_normal().string();
  return options;
}

uint64_t sum_of_row_bytes(const std::vector<ConstLeaf>& leaves) {
  uint64_t sum = 0;
  for (const ConstLeaf& leaf : leaves) sum += leaf.row_bytes;
  return sum;
}

bool is_present(const State& state, const Digest& key, uint32_t layout) {
  const Queue::Row queued = state.queue.find(key);
  if (queued.batch != nullptr && queued.batch->layout == layout) return true;
  return nullptr !=
         state.index.find(key.low, [&](const Entry& e) { return state.index.block(e.block).layout == layout; });
}

void copy_row(const std::vector<ConstLeaf>& leaves, size_t row, uint8_t* out) {
  for (const ConstLeaf& leaf : leaves) {
    if (leaf.row_bytes > 0) memcpy(out, leaf.data + row * leaf.row_bytes, leaf.row_bytes);
    out += leaf.row_bytes;
  }
}

}  // namespace

Store::Store(const Options& options) : state_(std::make_shared<State>(validated(options))) {}

std::shared_ptr<Store> Store::open(const Options& options) {
  std::shared_ptr<Store> store(new Store(options));
  refresh(*store->state_);
  return store;
}

Store::~Store() { close(); }

// ---- lookup and read

std::string Store::lookup(const Digest* keys, size_t n, uint8_t* present, const std::string& wanted) {
  std::fill_n(present, n, 0);
  uint32_t layout = Index::kNone;
  Lock lock(state_->mutex);
  const auto missing = [&] {
    if (!wanted.empty()) layout = state_->index.layout_number(wanted);
    return !wanted.empty() && layout == Index::kNone ? n : find_missing(keys, n, present, &layout);
  };
  if (missing() > 0 && refresh_is_due(*state_)) {
    lock.unlock();
    refresh(*state_);
    lock.lock();
    missing();
  }
  const bool any = std::find(present, present + n, 1) != present + n;
  return any && !state_->closed ? state_->index.layout(layout) : "";
}

// Marks those not yet present that are here in this layout, or, if that is kNone, in the layout of
// the first one that is here. How many are still missing.
size_t Store::find_missing(const Digest* keys, size_t n, uint8_t* present, uint32_t* layout) const {
  const Index& index = state_->index;
  const auto accept = [layout](uint32_t candidate) {
    if (*layout == Index::kNone) *layout = candidate;
    return *layout == candidate;
  };
  size_t missing = 0;
  for (size_t i = 0; i < n; ++i) {
    if (i % kPrefetchedKeys == 0) index.prefetch(keys + i, std::min(kPrefetchedKeys, n - i));
    if (present[i]) continue;
    const Queue::Row queued = state_->queue.find(keys[i]);
    present[i] =
        (queued.batch != nullptr && accept(queued.batch->layout)) ||
        nullptr != index.find(keys[i].low, [&](const Entry& e) { return accept(index.block(e.block).layout); });
    missing += !present[i];
  }
  return missing;
}

void Store::read(const Digest* keys, size_t n, const std::string& layout, const std::vector<Leaf>& out, uint8_t* ok) {
  read_rows(*state_, keys, n, layout, out, ok);
}

// ---- write

size_t Store::write(const Digest* keys, size_t n, const std::string& layout, const std::vector<ConstLeaf>& rows) {
  const uint64_t row_bytes = sum_of_row_bytes(rows);
  if (row_bytes > kMaxRowBytes || layout.size() > kMaxLayoutBytes) {
    std::lock_guard lock(state_->mutex);
    state_->warn("rows of more than 1 GiB, or with a layout of more than 64 KiB, are not kept in " +
                 state_->options.directory);
    state_->dropped_rows += n;
    return n;
  }
  // In parts that leave room in the queue, so that copying and writing overlap.
  const uint64_t part = state_->options.queue_bytes / 4 / std::max<uint64_t>(1, row_bytes);
  const size_t max_rows = std::clamp<uint64_t>(part, 1, kMaxRows);
  for (size_t first = 0; first < n; first += max_rows) {
    const size_t count = std::min(max_rows, n - first);
    const size_t written = write_chunk({keys + first, count, layout, rows, first, row_bytes});
    if (written < count) return first + written;
  }
  return n;
}

size_t Store::write_chunk(const Chunk& chunk) {
  std::vector<size_t> rows;
  uint64_t cost = 0;
  Lock lock(state_->mutex);
  if (state_->closing) return chunk.n;
  size_t admitted = admit_new_rows(chunk, &rows, &cost);
  if (rows.empty()) return admitted;
  if (!start_writer()) {
    state_->dropped_rows += rows.size();
    return admitted;
  }
  const std::shared_ptr<Writer> writer = writer_;
  const uint64_t bytes = rows.size() * chunk.row_bytes;
  if (!writer->has_room(bytes)) {
    if (!writer->wait_for_room(lock, bytes)) {
      drop(rows.size());
      return admitted;
    }
    if (state_->closing) return chunk.n;
    admitted = admit_new_rows(chunk, &rows, &cost);  // others may have written rows meanwhile
  }
  enqueue(chunk, rows, cost, lock);
  return admitted;
}

// Which rows of the chunk are not present, each key once.
std::vector<size_t> Store::new_rows(const Chunk& chunk) const {
  State& state = *state_;
  const uint32_t layout = state.index.intern(chunk.layout);
  std::vector<size_t> rows;
  std::pmr::monotonic_buffer_resource memory;
  std::pmr::unordered_set<uint64_t> seen(chunk.n, &memory);
  for (size_t i = 0; i < chunk.n; ++i) {
    if (i % kPrefetchedKeys == 0) state.index.prefetch(chunk.keys + i, std::min(kPrefetchedKeys, chunk.n - i));
    if (!is_present(state, chunk.keys[i], layout) && seen.insert(chunk.keys[i].low).second) rows.push_back(i);
  }
  return rows;
}

// The rows of the chunk that are new and fit, and what each may cost. How many of its first rows
// are here already or fit.
size_t Store::admit_new_rows(const Chunk& chunk, std::vector<size_t>* rows, uint64_t* row_cost) {
  State& state = *state_;
  *rows = new_rows(chunk);
  if (rows->empty()) return chunk.n;
  const uint64_t used = state.committed_bytes() + (writer_ == nullptr ? segment_cost() : kPageHeaderBytes);
  const Admission admission = admit(state.options, chunk.layout.size(), chunk.row_bytes, rows->size(), used);
  *row_cost = admission.row_cost;
  if (admission.rows == rows->size()) return chunk.n;
  state.full = true;
  const size_t admitted = (*rows)[admission.rows];
  rows->resize(admission.rows);
  return admitted;
}

bool Store::start_writer() {
  if (writer_ != nullptr) return true;
  if (Clock::now() < next_start_) return false;
  Error error = 0;
  writer_ = Writer::start(state_, &error);
  if (writer_ != nullptr) return true;
  state_->warn("rows are not kept, since nothing can be written to", error);
  next_start_ = Clock::now() + seconds(state_->options.retry_seconds);
  return false;
}

// Copies the rows without the mutex, then queues them.
void Store::enqueue(const Chunk& chunk, const std::vector<size_t>& rows, uint64_t row_cost, Lock& lock) {
  State& state = *state_;
  const std::shared_ptr<Writer> writer = writer_;
  if (rows.empty() || writer == nullptr) return;
  const uint64_t bytes = rows.size() * chunk.row_bytes;
  auto batch = std::make_shared<Batch>();
  batch->layout = state.index.intern(chunk.layout);
  batch->row_bytes = chunk.row_bytes;
  batch->row_cost = row_cost;
  batch->keys.reserve(rows.size());
  for (size_t row : rows) batch->keys.push_back(chunk.keys[row]);
  state.pending_bytes += bytes;
  state.pending_cost += rows.size() * row_cost;
  lock.unlock();
  batch->rows = state.buffers.allocate(bytes);
  if (batch->rows != nullptr) {
    uint8_t* out = batch->rows.get();
    for (size_t row : rows) {
      copy_row(chunk.leaves, chunk.first + row, out);
      out += chunk.row_bytes;
    }
  }
  lock.lock();
  state.pending_bytes -= bytes;
  state.pending_cost -= rows.size() * row_cost;
  if (batch->rows != nullptr && !state.closing) {
    writer->push(std::move(batch));
    return;
  }
  state.dropped_rows += rows.size();
  writer->wake_waiting();
}

void Store::drop(uint64_t rows) {
  state_->dropped_rows += rows;
  state_->warn("rows were dropped, since nothing could be written for too long to " + state_->options.directory);
}

// ---- ending

void Store::flush() {
  Lock lock(state_->mutex);
  const std::shared_ptr<Writer> writer = writer_;
  if (writer == nullptr) return;
  if (!writer->wait_until_empty(lock)) {
    drop(state_->queue.rows());
    state_->queue.clear();
    writer->wake_waiting();
  }
  const std::shared_ptr<File> file = writer->file();
  lock.unlock();
  if (file != nullptr && file->on_network()) file->sync();
}

void Store::close() {
  {
    std::lock_guard lock(state_->mutex);
    if (state_->closing) return;
    state_->closing = true;
  }
  flush();
  Lock lock(state_->mutex);
  if (writer_ != nullptr) writer_->stop(lock);
  writer_.reset();
  state_->closed = true;
  state_->index = Index();
  state_->queue.clear();
  state_->row_ends.clear();
  state_->segments.close_all_files();
}

void Store::before_fork() {
  state_->mutex.lock();
  state_->buffers.lock();
}

// In a child no other thread exists.
void Store::after_fork(bool child) {
  state_->buffers.unlock();
  if (child) become_child();
  state_->mutex.unlock();
}

void Store::become_child() {
  State& state = *state_;
  state.queue.clear();
  state.pending_bytes = state.pending_cost = state.own_bytes = 0;
  state.full = state.refreshing = false;
  state.closing = state.closed;
  state.next_refresh = Clock::time_point();
  state.segments.disown_all();
  if (writer_ == nullptr) return;
  if (writer_->file() != nullptr) writer_->file()->abandon();
  new std::shared_ptr<Writer>(std::move(writer_));  // leaked: see Writer
  writer_.reset();
}

Alerts Store::alerts() const {
  std::lock_guard lock(state_->mutex);
  return {!state_->warnings.empty(), state_->full};
}

Stats Store::stats() const {
  std::lock_guard lock(state_->mutex);
  Stats stats;
  stats.rows = state_->index.keys() + state_->queue.rows();
  stats.bytes_written = state_->committed_bytes();
  stats.queued_rows = state_->queue.rows();
  stats.queued_bytes = state_->queue.bytes();
  stats.damaged_rows = state_->damaged_rows;
  stats.dropped_rows = state_->dropped_rows;
  stats.full = state_->full;
  return stats;
}

std::vector<std::string> Store::drain_warnings() {
  std::lock_guard lock(state_->mutex);
  return std::exchange(state_->warnings, {});
}

}  // namespace torchcache::store
