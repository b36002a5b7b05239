// The order of steps is what makes it safe: copy, write, sync, rename, sync the directory, remove.
#include "store/maintenance/compaction.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>

#include "store/format/index_file.h"

namespace torchcache::store {
namespace {

constexpr uint64_t kPendingBytes = 16 << 20;  // of all rows that wait for a full block

// Names in a directory survive a power cut once it is synced. Some file systems cannot do that.
void sync_directory(const std::string& directory) {
  const int fd = ::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return;
  ::fsync(fd);
  ::close(fd);
}

// Rows are as old as before, for pruning by age.
void set_modified(const std::string& path, int64_t nanoseconds) {
  const struct timespec modified = {nanoseconds / 1000000000, nanoseconds % 1000000000};
  const struct timespec times[2] = {modified, modified};
  ::utimensat(AT_FDCWD, path.c_str(), times, AT_SYMLINK_NOFOLLOW);
}

void rename_file(const std::string& from, const std::string& to) {
  throw_on_error(::rename(from.c_str(), to.c_str()) == 0 ? 0 : errno, "cannot make", to);
}

}  // namespace

Compaction::~Compaction() {
  if (segment_ != nullptr) {
    ::unlink(segment_path(work_, segment_->id()).c_str());
    ::unlink(index_path(work_, segment_->id()).c_str());
  }
  ::rmdir(work_.c_str());
}

void Compaction::retain(const SegmentId& id) {
  for (BlockCursor blocks(directory_, id); blocks.next();) {
    const Digest layout = layout_digest(blocks.header(), blocks.layout());
    for (uint32_t row = 0; row < blocks.header().rows; ++row) seen_.insert(blocks.key(row), layout);
  }
}

bool Compaction::add_segment(const SegmentId& id) {
  if (!is_idle(segment_path(directory_, id))) return false;
  BlockCursor blocks(directory_, id);
  FileState state;
  throw_on_error(blocks.file().state(&state), "cannot read", blocks.path());
  modified_ = state.modified;
  while (blocks.next()) {
    const BlockHeader& header = blocks.header();
    const RowFormat format(blocks.layout(), header.row_bytes, header.codec);
    const Digest layout = layout_digest(header, std::get<0>(format));
    RowCursor rows(blocks);
    for (StoredRow row; rows.next(&row);) {
      if (!row.valid)
        ++counts_.damaged;
      else if (!seen_.insert(row.key, layout))
        ++counts_.duplicates;
      else
        add_row(format, row);
    }
  }
  counts_.damaged += blocks.holes().size();
  copied_.emplace_back(id, blocks.bytes());
  return true;
}

void Compaction::finish() { publish(); }

bool Compaction::is_full(uint64_t more) const {
  const uint64_t used = segment_ == nullptr ? kHeaderBytes : segment_->end();
  return used + pending_bytes_ > kHeaderBytes && used + pending_bytes_ + more > kRotateBytes;
}

void Compaction::add_row(const RowFormat& format, const StoredRow& row) {
  const uint64_t cost = row.length + row_table_bytes(Codec::kZstd);
  if (is_full(cost + block_overhead(std::get<0>(format).size()))) publish();
  Pending* pending = &pending_[format];
  if (!pending->rows.empty() && pending->rows.size() + row.length > kBlockBytes) write(format, pending);
  if (pending->block.keys.size() == kMaxRows) write(format, pending);
  if (pending->block.keys.empty()) pending_bytes_ += block_overhead(std::get<0>(format).size());
  pending->block.keys.push_back(row.key);
  pending->block.checks.push_back(row.check);
  if (std::get<2>(format) == Codec::kZstd) pending->block.lengths.push_back(static_cast<uint32_t>(row.length));
  pending->rows.insert(pending->rows.end(), row.data, row.data + row.length);
  pending_bytes_ += cost;
  newest_ = std::max(newest_, modified_);
  ++counts_.rows;
  if (pending_bytes_ > kPendingBytes) write_all();
}

// Appends the block and empties it.
void Compaction::write(const RowFormat& format, Pending* pending) {
  NewBlock& block = pending->block;
  if (block.keys.empty()) return;
  if (segment_ == nullptr) {
    Error error = make_directories(work_);
    if (error == 0) segment_ = SegmentWriter::create(work_, &error);
    throw_on_error(error, "cannot write to", work_);
  }
  std::tie(block.layout, block.row_bytes, block.codec) = format;
  block.payload = {{pending->rows.data(), pending->rows.size()}};
  block.payload_bytes = pending->rows.size();
  BlockHeader header;
  throw_on_error(segment_->append(block, &header), "cannot write to", work_);
  pending_bytes_ -=
      block_overhead(block.layout.size()) + row_table_bytes(Codec::kZstd) * block.keys.size() + pending->rows.size();
  pending->rows.clear();
  block.keys.clear();
  block.checks.clear();
  block.lengths.clear();
}

void Compaction::write_all() {
  for (auto& [format, pending] : pending_) write(format, &pending);
  pending_.clear();
}

void Compaction::publish() {
  write_all();
  if (segment_ != nullptr) seal();
  remove_old();
}

void Compaction::seal() {
  const SegmentId id = segment_->id();
  throw_on_error(segment_->file()->sync(), "cannot write to", work_);
  throw_on_error(write_index(work_, id), "cannot write to", work_);
  set_modified(segment_path(work_, id), newest_);
  newest_ = 0;
  rename_file(index_path(work_, id), index_path(directory_, id));
  rename_file(segment_path(work_, id), segment_path(directory_, id));
  sync_directory(directory_);
  segment_.reset();
  ++counts_.written;
}

// What is in copied_ is in segments that are in place.
void Compaction::remove_old() {
  for (const auto& [id, bytes] : copied_) {
    const std::string path = segment_path(directory_, id);
    FileState now;
    if (path_state(path, &now) != 0 || std::min(now.size, kMaxSegmentBytes) != bytes)
      continue;  // gone, or its writer lives and has no lock
    if (!remove_idle(path)) continue;
    ::unlink(index_path(directory_, id).c_str());
    ++counts_.removed;
  }
  copied_.clear();
}

}  // namespace torchcache::store
