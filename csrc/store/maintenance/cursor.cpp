// Tells damage from what cannot be read, and from what is not written yet.
#include "store/maintenance/cursor.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>

#include "store/format/bytes.h"
#include "store/format/compression.h"

namespace torchcache::store {
namespace {

constexpr uint64_t kReadBytes = 1 << 20;
constexpr uint32_t kVersion = 1;

std::shared_ptr<File> open_segment(const std::string& path) {
  Error error = 0;
  auto file = File::open(path, 0, &error);
  throw_on_error(error, "cannot read", path);
  return file;
}

uint64_t size_of(const File& file, const std::string& path) {
  FileState state;
  throw_on_error(file.state(&state), "cannot read", path);
  return std::min(state.size, kMaxSegmentBytes);
}

// What a later version wrote must not count as damage.
void check_version(const File& file, const SegmentId& id, const std::string& path) {
  uint8_t header[kHeaderBytes], expected[kHeaderBytes];
  encode_segment_header(id, expected);
  const Error error = file.read(header, kHeaderBytes, 0);
  if (error == kShortFile) return;
  throw_on_error(error, "cannot read", path);
  const uint32_t version = load<uint32_t>(header + 8);
  if (memcmp(header, expected, 8) == 0 && version != kVersion && digest(header, 56).low == load<uint64_t>(header + 56))
    throw std::runtime_error(path + " is of version " + std::to_string(version) +
                             " and this torchcache knows version 1 only: use a newer torchcache");
}

}  // namespace

void throw_on_error(Error error, const std::string& what, const std::string& path) {
  if (error != 0) throw std::runtime_error(what + " " + path + ": " + error_text(error));
}

BlockCursor::BlockCursor(const std::string& directory, const SegmentId& id, uint64_t position)
    : path_(segment_path(directory, id)),
      id_(id),
      file_(open_segment(path_)),
      bytes_(size_of(*file_, path_)),
      scanner_(*file_, id, position, bytes_) {
  check_version(*file_, id, path_);
}

bool BlockCursor::next() {
  const size_t holes = scanner_.holes().size();
  const bool at_block = scanner_.next();
  std::vector<uint8_t> bytes;
  for (size_t hole = holes == 0 ? 0 : holes - 1; hole < scanner_.holes().size(); ++hole) {
    const Hole& range = scanner_.holes()[hole];
    for (uint64_t at = range.begin; at < range.end; at += bytes.size()) {
      bytes.resize(std::min(kReadBytes, range.end - at));
      throw_on_error(file_->read(bytes.data(), bytes.size(), at), "cannot read", path_);
    }
  }
  if (!at_block) check_end();
  return at_block;
}

// A scanner also stops where it cannot read.
void BlockCursor::check_end() const {
  const uint64_t at = scanner_.position();
  if (at + kHeaderBytes > bytes_) return;
  uint8_t bytes[kHeaderBytes];
  BlockHeader header;
  throw_on_error(file_->read(bytes, kHeaderBytes, at), "cannot read", path_);
  if (!decode_block_header(bytes, id_, at, &header) || header.end() <= bytes_)
    throw_on_error(EIO, "cannot read", path_);
}

RowCursor::RowCursor(const BlockCursor& blocks)
    : blocks_(blocks), header_(blocks.header()), table_(blocks.table()), offset_(header_.payload_offset()) {}

uint64_t RowCursor::length(uint32_t row) const {
  return table_.lengths == nullptr ? header_.row_bytes : table_.length(row);
}

void RowCursor::read_next() {
  uint64_t size = 0;
  for (end_ = row_; end_ < header_.rows && (end_ == row_ || size + length(end_) <= kReadBytes); ++end_)
    size += length(end_);
  bytes_.resize(size);
  used_ = 0;
  throw_on_error(blocks_.file().read(bytes_.data(), size, offset_), "cannot read", blocks_.path());
}

bool RowCursor::next(StoredRow* row) {
  if (row_ == header_.rows) return false;
  if (row_ == end_) read_next();
  const uint64_t size = length(row_), check = table_.check(row_);
  *row = {row_, offset_, bytes_.data() + used_, size, blocks_.key(row_), check, false};
  row->valid = is_valid(*row);
  ++row_;
  used_ += size;
  offset_ += size;
  return true;
}

bool RowCursor::is_valid(const StoredRow& row) {
  if (row_check(digest(row.data, row.length), row.key) != row.check) return false;
  if (header_.codec == Codec::kRaw || row.length == header_.row_bytes) return true;
  scratch_.resize(header_.row_bytes);
  return decompress_row(row.data, row.length, scratch_.data(), header_.row_bytes);
}

}  // namespace torchcache::store
