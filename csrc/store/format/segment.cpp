// Scanning skips damage; writing leaves whole blocks or nothing.
#include "store/format/segment.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "store/format/bytes.h"

namespace torchcache::store {
namespace {

constexpr uint64_t kScanBytes = 1 << 20;
constexpr uint8_t kZeros[kAlignment] = {};

iovec part(const void* data, uint64_t size) { return {const_cast<void*>(data), size}; }

// Header and table of a block at `offset`.
std::vector<uint8_t> block_head(const NewBlock& block, const SegmentId& id, BlockHeader* header) {
  const uint64_t size = table_bytes(block.codec, block.keys.size(), block.layout.size());
  std::vector<uint8_t> head(kHeaderBytes + size);
  uint8_t* const table = head.data() + kHeaderBytes;
  memcpy(table, block.layout.data(), block.layout.size());
  uint8_t* out = table + padded(block.layout.size(), 8);
  for (const Digest& key : block.keys) {
    to_canonical(key, out);
    out += 16;
  }
  memcpy(out, block.checks.data(), 8 * block.checks.size());
  out += 8 * block.checks.size();
  if (block.codec == Codec::kZstd) memcpy(out, block.lengths.data(), 4 * block.lengths.size());
  header->codec = block.codec;
  header->rows = static_cast<uint32_t>(block.keys.size());
  header->layout_bytes = static_cast<uint32_t>(block.layout.size());
  header->row_bytes = block.row_bytes;
  header->payload_bytes = block.payload_bytes;
  header->table_check = digest(table, size).low;
  encode_block_header(*header, id, head.data());
  return head;
}

}  // namespace

Scanner::Scanner(const File& file, const SegmentId& id, uint64_t position, uint64_t end)
    : file_(file), id_(id), position_(position), end_(std::min(end, kMaxSegmentBytes)) {}

bool Scanner::next() {
  for (;;) {
    const Step step = read_block(position_);
    if (step == Step::kEnd) return false;
    if (step == Step::kBlock) {
      position_ = header_.end();
      return true;
    }
    skip_to(next_header(position_ + kAlignment));
  }
}

Scanner::Step Scanner::read_block(uint64_t position) {
  uint8_t bytes[kHeaderBytes];
  if (position + kHeaderBytes > end_ || file_.read(bytes, kHeaderBytes, position) != 0) return Step::kEnd;
  if (!decode_block_header(bytes, id_, position, &header_)) return Step::kNoBlock;
  if (header_.end() > end_) return Step::kEnd;
  table_.resize(header_.payload_offset() - position - kHeaderBytes);
  if (file_.read(table_.data(), table_.size(), position + kHeaderBytes) != 0) return Step::kEnd;
  return table_is_valid(header_, table_.data()) ? Step::kBlock : Step::kNoBlock;
}

// The next multiple of 64 with a right header, or the last one that is no more than end_.
uint64_t Scanner::next_header(uint64_t position) {
  std::vector<uint8_t> bytes;
  BlockHeader header;
  while (position + kHeaderBytes <= end_) {
    bytes.resize(std::min(kScanBytes, (end_ - position) / kAlignment * kAlignment));
    if (file_.read(bytes.data(), bytes.size(), position) != 0) break;
    for (uint64_t at = 0; at < bytes.size(); at += kAlignment)
      if (decode_block_header(&bytes[at], id_, position + at, &header)) return position + at;
    position += bytes.size();
  }
  return std::max(position_ + kAlignment, end_ / kAlignment * kAlignment);
}

void Scanner::skip_to(uint64_t end) {
  if (!holes_.empty() && holes_.back().end == position_)
    holes_.back().end = end;
  else
    holes_.push_back({position_, end});
  position_ = end;
}

uint64_t NewBlock::bytes() const {
  return kHeaderBytes + table_bytes(codec, keys.size(), layout.size()) + padded(payload_bytes, kAlignment);
}

std::unique_ptr<SegmentWriter> SegmentWriter::create(const std::string& directory, Error* error) {
  const SegmentId id = random_id();
  const std::string path = segment_path(directory, id);
  auto file = File::create(path, error);
  if (file == nullptr) return nullptr;
  uint8_t header[kHeaderBytes];
  encode_segment_header(id, header);
  *error = file->write({part(header, kHeaderBytes)}, 0);
  if (*error == 0) return std::unique_ptr<SegmentWriter>(new SegmentWriter(id, file));
  ::unlink(path.c_str());
  return nullptr;
}

Error SegmentWriter::append(const NewBlock& block, BlockHeader* header) {
  header->offset = end_;
  const std::vector<uint8_t> head = block_head(block, id_, header);
  std::vector<iovec> parts = {part(head.data(), head.size())};
  parts.insert(parts.end(), block.payload.begin(), block.payload.end());
  const uint64_t padding = padded(block.payload_bytes, kAlignment) - block.payload_bytes;
  parts.push_back(part(kZeros, padding));
  const Error error = file_->write(std::move(parts), end_);
  if (error != 0)
    file_->truncate(end_);  // a torn tail does no harm, but may fill the disk
  else
    end_ = header->end();
  return error;
}

bool SegmentWriter::deleted() const {
  FileState state;
  return file_->state(&state) == 0 && state.links == 0;
}

}  // namespace torchcache::store
