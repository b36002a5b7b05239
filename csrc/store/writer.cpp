// Blocks as large as what is queued allows; after an error smaller ones, then one row every 5 s.
#include "store/writer.h"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

#include "store/format/index_file.h"

namespace torchcache::store {
namespace {

// While it lives, a thread that is started handles no signals: those are the application's, and
// SIGXFSZ becomes an error of the write.
class SignalsBlocked {
 public:
  SignalsBlocked() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

 private:
  sigset_t before_;
};

}  // namespace

Writer::Writer(std::shared_ptr<State> state)
    : state_(std::move(state)),
      compressor_(state_->options.zstd_level, state_->options.zstd ? state_->options.zstd_threads : 0),
      block_bytes_(kBlockBytes) {}

std::shared_ptr<Writer> Writer::start(const std::shared_ptr<State>& state, Error* error) {
  *error = make_directories(state->options.directory);
  if (*error != 0) return nullptr;
  sweep_temporaries(state->options.directory);
  auto segment = SegmentWriter::create(state->options.directory, error);
  if (segment == nullptr) return nullptr;
  const std::string path = segment_path(state->options.directory, segment->id());
  std::shared_ptr<Writer> writer(new Writer(state));
  try {
    SignalsBlocked until_started;
    writer->thread_ = std::thread([writer] {
      core::MutexLock lock(writer->state_->mutex);
      writer->run();
    });
  } catch (const std::system_error& failure) {
    *error = failure.code().value();
    ::unlink(path.c_str());
    return nullptr;
  }
  writer->state_->mutex.assert_held();
  writer->adopt(std::move(segment));
  return writer;
}

// ---- what the store calls

void Writer::push(std::shared_ptr<const Batch> batch) {
  state_->mutex.assert_held();
  if (state_->queue.empty()) last_progress_ = Clock::now();
  state_->queue.push(std::move(batch));
  work_.notify_one();
}

bool Writer::is_stalled() const {
  return !state_->queue.empty() && Clock::now() - last_progress_ > seconds(state_->options.patience_seconds);
}

// False once nothing was written for too long.
bool Writer::wait_for_progress() {
  if (is_stalled()) return false;
  const auto patience = last_progress_ + seconds(state_->options.patience_seconds);
  progress_.wait_until(state_->mutex, std::max(patience, Clock::now() + std::chrono::milliseconds(10)));
  return true;
}

bool Writer::has_room(uint64_t bytes) const {
  state_->mutex.assert_held();
  const uint64_t used = state_->queue.bytes() + state_->pending_bytes;
  return used == 0 || used + bytes <= state_->options.queue_bytes;
}

bool Writer::wait_for_room(uint64_t bytes) {
  state_->mutex.assert_held();
  while (!has_room(bytes))
    if (!wait_for_progress()) return false;
  return true;
}

bool Writer::wait_until_empty() {
  state_->mutex.assert_held();
  while (!state_->queue.empty())
    if (!wait_for_progress()) return false;
  return true;
}

void Writer::stop() {
  state_->mutex.assert_held();
  stop_ = true;
  work_.notify_one();
  const auto patience = Clock::now() + seconds(state_->options.patience_seconds);
  while (!ended_ && Clock::now() < patience) progress_.wait_until(state_->mutex, patience);
  if (!ended_) return thread_.detach();  // in a write that does not return
  core::MutexUnlock unlocked(state_->mutex);
  thread_.join();
}

std::shared_ptr<File> Writer::file() const {
  state_->mutex.assert_held();
  return file_;
}

// ---- the thread

void Writer::run() {
  while (write_next()) continue;
  {
    core::MutexUnlock unlocked(state_->mutex);
    seal();
  }
  ended_ = true;
  progress_.notify_all();
}

// Waits for rows and writes a block of them. False if the thread is to end.
bool Writer::write_next() {
  while (!stop_ && state_->queue.empty()) work_.wait(state_->mutex);
  if (state_->queue.empty()) return false;
  const Work work = next_work();
  Error error = 0;
  {
    core::MutexUnlock unlocked(state_->mutex);
    error = write(work);
  }
  if (error == 0) {
    block_bytes_ = kBlockBytes;
    return true;
  }
  state_->warn("rows wait in memory, since they cannot be written to", error);
  block_bytes_ = work.bytes / 2;
  const auto retry = Clock::now() + seconds(state_->options.retry_seconds);
  while (work.rows == 1 && !stop_ && Clock::now() < retry) work_.wait_until(state_->mutex, retry);
  return true;
}

Writer::Work Writer::next_work() const {
  Work work;
  work.slices = state_->queue.front(block_bytes_, kMaxRows);
  work.layout = state_->index.layout(work.slices.front().batch->layout);
  for (const Slice& slice : work.slices) work.rows += slice.count;
  work.bytes = work.rows * work.slices.front().batch->row_bytes;
  return work;
}

NewBlock Writer::assemble(const Work& work, CompressedRows* compressed) {
  NewBlock block;
  block.codec = state_->options.zstd ? Codec::kZstd : Codec::kRaw;
  block.layout = work.layout;
  block.row_bytes = work.slices.front().batch->row_bytes;
  block.payload_bytes = work.bytes;
  std::vector<const uint8_t*> rows;
  rows.reserve(work.rows);
  block.keys.reserve(work.rows);
  block.checks.reserve(work.rows);
  for (const Slice& slice : work.slices) {
    const uint8_t* first = slice.batch->row(slice.first);
    block.payload.push_back({const_cast<uint8_t*>(first), slice.count * block.row_bytes});
    for (size_t row = slice.first; row < slice.first + slice.count; ++row) {
      block.keys.push_back(slice.batch->keys[row]);
      rows.push_back(slice.batch->row(row));
    }
  }
  if (block.codec == Codec::kZstd) {
    *compressed = compressor_.compress(rows, block.row_bytes);
    block.payload = {{compressed->bytes.get(), compressed->size}};
    block.payload_bytes = compressed->size;
    block.lengths = compressed->lengths;
    const uint8_t* stored = compressed->bytes.get();
    for (size_t row = 0; row < rows.size(); stored += block.lengths[row++]) rows[row] = stored;
  }
  for (size_t row = 0; row < rows.size(); ++row) {
    const uint64_t size = block.lengths.empty() ? block.row_bytes : block.lengths[row];
    block.checks.push_back(row_check(digest(rows[row], size), block.keys[row]));
  }
  return block;
}

Error Writer::write(const Work& work) try {
  CompressedRows compressed;
  const NewBlock block = assemble(work, &compressed);
  if (const Error error = prepare_segment(block.bytes())) return error;
  BlockHeader header;
  const Error error = segment_->append(block, &header);
  if (error != 0) return error;
  core::MutexLock lock(state_->mutex);
  record(work, block, header);
  return 0;
} catch (const std::bad_alloc&) {
  return ENOMEM;
}

// What is written moves from the queue to the index in one step.
void Writer::record(const Work& work, const NewBlock& block, const BlockHeader& header) {
  const uint32_t layout = work.slices.front().batch->layout;
  rows_ += work.rows;
  ++blocks_;
  if (layouts_.insert(layout).second) layout_bytes_ += catalog_layout_bytes(block.layout.size());
  count_own_bytes();
  last_progress_ = Clock::now();
  progress_.notify_all();
  if (state_->closed) return;
  const uint32_t number = state_->index.add_block(to_block(header, number_, layout));
  for (uint32_t row = 0; row < header.rows; ++row)
    state_->index.insert({block.keys[row].low, block.checks[row], number, row});
  state_->segments[number_].position = header.end();
  state_->queue.pop(work.slices);
}

void Writer::count_own_bytes() {
  const uint64_t own = segment_ == nullptr ? 0 : segment_->end() + index_file_bytes(rows_, blocks_, layout_bytes_);
  state_->own_bytes = sealed_bytes_ + own;
}

// ---- the own segment

Error Writer::prepare_segment(uint64_t block_bytes) {
  if (segment_ != nullptr && segment_->deleted()) {
    core::MutexLock lock(state_->mutex);
    state_->warn("the cache directory " + state_->options.directory + " was deleted; it is made again for new rows");
    leave_segment(true);
  } else if (segment_ != nullptr && blocks_ > 0 && segment_->end() + block_bytes > state_->options.rotate_bytes) {
    seal();
  }
  return segment_ != nullptr ? 0 : new_segment();
}

Error Writer::new_segment() {
  Error error = make_directories(state_->options.directory);
  if (error != 0) return error;
  auto segment = SegmentWriter::create(state_->options.directory, &error);
  if (segment == nullptr) return error;
  core::MutexLock lock(state_->mutex);
  adopt(std::move(segment));
  return 0;
}

void Writer::adopt(std::unique_ptr<SegmentWriter> segment) {
  segment_ = std::move(segment);
  file_ = segment_->file();
  rows_ = blocks_ = layout_bytes_ = 0;
  layouts_.clear();
  number_ = state_->segments.add(segment_->id());
  Segment& own = state_->segments[number_];
  own.own = own.scanned = true;
  count_own_bytes();
}

// From now on the segment is like one that another process wrote.
void Writer::leave_segment(bool gone) {
  count_own_bytes();
  sealed_bytes_ = state_->own_bytes;
  segment_.reset();
  file_.reset();
  state_->segments[number_].own = false;
  if (gone) state_->remove_segment(number_);
}

void Writer::seal() {
  if (segment_ == nullptr) return;
  const std::string& directory = state_->options.directory;
  const bool empty = segment_->end() == kHeaderBytes;
  if (empty) {
    ::unlink(segment_path(directory, segment_->id()).c_str());
  } else {
    if (segment_->file()->on_network()) segment_->file()->sync();
    write_index(directory, segment_->id());
  }
  core::MutexLock lock(state_->mutex);
  leave_segment(empty);
}

}  // namespace torchcache::store
