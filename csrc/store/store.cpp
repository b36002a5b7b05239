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

#include "core/fork.h"
#include "core/mutex.h"
#include "store/admission.h"
#include "store/reader.h"
#include "store/refresh.h"
#include "store/state.h"
#include "store/writer.h"

namespace torchcache::store {
namespace {

using core::MutexLock;

// Rows of one write that are queued together.
struct Chunk {
  const Digest* keys;
  size_t n;
  const std::string& layout;
  const std::vector<ConstLeaf>& leaves;
  size_t first;  // row of the leaves that keys[0] belongs to
  uint64_t row_bytes;
};

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

bool is_present(const Queue& queue, const Index& index, const Digest& key, uint32_t layout) {
  const Queue::Row queued = queue.find(key);
  if (queued.batch != nullptr && queued.batch->layout == layout) return true;
  return nullptr != index.find_by_block(key.low, [&](const Block& block) { return block.layout == layout; });
}

void copy_rows(const Chunk& chunk, const std::vector<size_t>& rows, uint8_t* out) {
  for (const size_t row : rows)
    for (const ConstLeaf& leaf : chunk.leaves) {
      if (leaf.row_bytes > 0) memcpy(out, leaf.data + (chunk.first + row) * leaf.row_bytes, leaf.row_bytes);
      out += leaf.row_bytes;
    }
}

class StoreImpl final : public Store {
 public:
  explicit StoreImpl(const Options& options) : state_(std::make_shared<State>(validated(options))) { refresh(*state_); }
  ~StoreImpl() override { close_once(); }

  std::string lookup(const Digest* keys, size_t n, uint8_t* present, const std::string& wanted) override;
  void read(const Digest* keys, size_t n, const std::string& layout, const std::vector<Leaf>& out,
            uint8_t* ok) override {
    read_rows(*state_, keys, n, layout, out, ok);
  }
  size_t write(const Digest* keys, size_t n, const std::string& layout, const std::vector<ConstLeaf>& rows) override;
  void flush() override { flush_queue(); }
  void close() override { close_once(); }
  Stats stats() const override;
  Alerts alerts() const override;
  std::vector<std::string> drain_warnings() override;

 private:
  size_t find_missing(const Digest* keys, size_t n, uint8_t* present, const std::string& wanted, uint32_t* layout) const
      TORCHCACHE_REQUIRES(state_->mutex);
  size_t write_chunk(const Chunk& chunk);
  std::vector<size_t> new_rows(const Chunk& chunk) const TORCHCACHE_REQUIRES(state_->mutex);
  size_t admit_new_rows(const Chunk& chunk, std::vector<size_t>* rows, uint64_t* row_cost)
      TORCHCACHE_REQUIRES(state_->mutex);
  bool start_writer() TORCHCACHE_REQUIRES(state_->mutex);
  void enqueue(const Chunk& chunk, const std::vector<size_t>& rows, uint64_t row_cost)
      TORCHCACHE_REQUIRES(state_->mutex);
  void drop(uint64_t rows) TORCHCACHE_REQUIRES(state_->mutex);
  void flush_queue();
  void close_once();
  void before_fork() TORCHCACHE_NO_THREAD_ANALYSIS;
  void after_fork(bool child) TORCHCACHE_NO_THREAD_ANALYSIS;
  void become_child() TORCHCACHE_REQUIRES(state_->mutex);

  const std::shared_ptr<State> state_;
  std::shared_ptr<Writer> writer_ TORCHCACHE_GUARDED_BY(state_->mutex);  // null before the first write
  Clock::time_point next_start_ TORCHCACHE_GUARDED_BY(state_->mutex);    // of a writer, after one could not be started
  core::AtFork at_fork_{[this] { before_fork(); }, [this](bool child) { after_fork(child); }};
};

// ---- lookup and read

std::string StoreImpl::lookup(const Digest* keys, size_t n, uint8_t* present, const std::string& wanted) {
  std::fill_n(present, n, 0);
  uint32_t layout = Index::kNone;
  MutexLock lock(state_->mutex);
  if (find_missing(keys, n, present, wanted, &layout) > 0 && refresh_is_due(*state_)) {
    {
      core::MutexUnlock unlocked(state_->mutex);
      refresh(*state_);
    }
    find_missing(keys, n, present, wanted, &layout);
  }
  const bool any = std::find(present, present + n, 1) != present + n;
  return any && !state_->closed ? state_->index.layout(layout) : "";
}

// Marks those not yet present that are here in the wanted layout, or, if that is "", in the one that
// is known, or, if that is kNone, in the layout of the first one that is here. How many are still
// missing.
size_t StoreImpl::find_missing(const Digest* keys, size_t n, uint8_t* present, const std::string& wanted,
                               uint32_t* layout) const {
  if (!wanted.empty()) *layout = state_->index.layout_number(wanted);
  if (!wanted.empty() && *layout == Index::kNone) return n;
  const auto accept = [layout](uint32_t candidate) {
    if (*layout == Index::kNone) *layout = candidate;
    return *layout == candidate;
  };
  size_t missing = 0;
  for (size_t i = 0; i < n; ++i) {
    if (i % kPrefetchedKeys == 0) state_->index.prefetch(keys + i, std::min(kPrefetchedKeys, n - i));
    if (present[i]) continue;
    const Queue::Row queued = state_->queue.find(keys[i]);
    const auto accept_block = [&](const Block& block) { return accept(block.layout); };
    present[i] = (queued.batch != nullptr && accept(queued.batch->layout)) ||
                 state_->index.find_by_block(keys[i].low, accept_block) != nullptr;
    missing += !present[i];
  }
  return missing;
}

// ---- write

size_t StoreImpl::write(const Digest* keys, size_t n, const std::string& layout, const std::vector<ConstLeaf>& rows) {
  const uint64_t row_bytes = sum_of_row_bytes(rows);
  if (row_bytes > kMaxRowBytes || layout.size() > kMaxLayoutBytes) {
    MutexLock lock(state_->mutex);
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

size_t StoreImpl::write_chunk(const Chunk& chunk) {
  std::vector<size_t> rows;
  uint64_t cost = 0;
  MutexLock lock(state_->mutex);
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
    if (!writer->wait_for_room(bytes)) {
      drop(rows.size());
      return admitted;
    }
    if (state_->closing) return chunk.n;
    admitted = admit_new_rows(chunk, &rows, &cost);  // others may have written rows meanwhile
  }
  enqueue(chunk, rows, cost);
  return admitted;
}

// Which rows of the chunk are not present, each key once.
std::vector<size_t> StoreImpl::new_rows(const Chunk& chunk) const {
  const uint32_t layout = state_->index.intern(chunk.layout);
  std::vector<size_t> rows;
  std::pmr::monotonic_buffer_resource memory;
  std::pmr::unordered_set<uint64_t> seen(chunk.n, &memory);
  for (size_t i = 0; i < chunk.n; ++i) {
    if (i % kPrefetchedKeys == 0) state_->index.prefetch(chunk.keys + i, std::min(kPrefetchedKeys, chunk.n - i));
    if (!is_present(state_->queue, state_->index, chunk.keys[i], layout) && seen.insert(chunk.keys[i].low).second)
      rows.push_back(i);
  }
  return rows;
}

// The rows of the chunk that are new and fit, and what each may cost. How many of its first rows
// are here already or fit.
size_t StoreImpl::admit_new_rows(const Chunk& chunk, std::vector<size_t>* rows, uint64_t* row_cost) {
  *rows = new_rows(chunk);
  if (rows->empty()) return chunk.n;
  const uint64_t used = state_->committed_bytes() + (writer_ == nullptr ? segment_cost() : kPageHeaderBytes);
  const Admission admission = admit(state_->options, chunk.layout.size(), chunk.row_bytes, rows->size(), used);
  *row_cost = admission.row_cost;
  if (admission.rows == rows->size()) return chunk.n;
  state_->full = true;
  const size_t admitted = (*rows)[admission.rows];
  rows->resize(admission.rows);
  return admitted;
}

bool StoreImpl::start_writer() {
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
void StoreImpl::enqueue(const Chunk& chunk, const std::vector<size_t>& rows, uint64_t row_cost) {
  const std::shared_ptr<Writer> writer = writer_;
  if (rows.empty() || writer == nullptr) return;
  const uint64_t bytes = rows.size() * chunk.row_bytes, cost = rows.size() * row_cost;
  auto batch = std::make_shared<Batch>();
  batch->layout = state_->index.intern(chunk.layout);
  batch->row_bytes = chunk.row_bytes;
  batch->row_cost = row_cost;
  batch->keys.reserve(rows.size());
  for (size_t row : rows) batch->keys.push_back(chunk.keys[row]);
  state_->pending_bytes += bytes;
  state_->pending_cost += cost;
  {
    core::MutexUnlock unlocked(state_->mutex);
    batch->rows = state_->buffers.allocate(bytes);
    if (batch->rows != nullptr) copy_rows(chunk, rows, batch->rows.get());
  }
  state_->pending_bytes -= bytes;
  state_->pending_cost -= cost;
  if (batch->rows != nullptr && !state_->closing) {
    writer->push(std::move(batch));
    return;
  }
  state_->dropped_rows += rows.size();
  writer->wake_waiting();
}

void StoreImpl::drop(uint64_t rows) {
  state_->dropped_rows += rows;
  state_->warn("rows were dropped, since nothing could be written for too long to " + state_->options.directory);
}

// ---- ending

void StoreImpl::flush_queue() {
  std::shared_ptr<File> file;
  {
    MutexLock lock(state_->mutex);
    const std::shared_ptr<Writer> writer = writer_;
    if (writer == nullptr) return;
    if (!writer->wait_until_empty()) {
      drop(state_->queue.rows());
      state_->queue.clear();
      writer->wake_waiting();
    }
    file = writer->file();
  }
  if (file != nullptr && file->on_network()) file->sync();
}

void StoreImpl::close_once() {
  {
    MutexLock lock(state_->mutex);
    if (state_->closing) return;
    state_->closing = true;
  }
  flush_queue();
  MutexLock lock(state_->mutex);
  if (writer_ != nullptr) writer_->stop();
  writer_.reset();
  state_->closed = true;
  state_->index = Index();
  state_->queue.clear();
  state_->row_ends.clear();
  state_->segments.close_all_files();
}

void StoreImpl::before_fork() {
  state_->mutex.lock();
  state_->buffers.lock();
}

// In a child no other thread exists.
void StoreImpl::after_fork(bool child) {
  state_->buffers.unlock();
  if (child) become_child();
  state_->mutex.unlock();
}

void StoreImpl::become_child() {
  state_->queue.clear();
  state_->pending_bytes = state_->pending_cost = state_->own_bytes = 0;
  state_->full = state_->refreshing = false;
  state_->closing = state_->closed;
  state_->next_refresh = Clock::time_point();
  state_->segments.disown_all();
  if (writer_ == nullptr) return;
  if (writer_->file() != nullptr) writer_->file()->abandon();
  new std::shared_ptr<Writer>(std::move(writer_));  // leaked: see Writer
  writer_.reset();
}

Alerts StoreImpl::alerts() const {
  MutexLock lock(state_->mutex);
  return {!state_->warnings.empty(), state_->full};
}

Stats StoreImpl::stats() const {
  MutexLock lock(state_->mutex);
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

std::vector<std::string> StoreImpl::drain_warnings() {
  MutexLock lock(state_->mutex);
  return std::exchange(state_->warnings, {});
}

}  // namespace

std::shared_ptr<Store> Store::open(const Options& options) { return std::make_shared<StoreImpl>(options); }

}  // namespace torchcache::store
