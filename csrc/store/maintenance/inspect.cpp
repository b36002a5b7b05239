// Walks that tell damage from what cannot be read, and from what is not written yet.
#include "store/maintenance/inspect.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <ctime>
#include <stdexcept>

#include "store/format/bytes.h"
#include "store/format/index_file.h"

namespace torchcache::store {
namespace {

constexpr uint64_t kReadBytes = 1 << 20;
constexpr int64_t kUntouched = 24 * 3600;  // seconds
constexpr uint32_t kVersion = 1;

std::shared_ptr<File> open_segment(const std::string& path) {
  Error error = 0;
  auto file = File::open(path, 0, &error);
  must(error, "cannot read", path);
  return file;
}

uint64_t size_of(const File& file, const std::string& path) {
  FileState state;
  must(file.state(&state), "cannot read", path);
  return std::min(state.size, kMaxSegmentBytes);
}

// What a later version wrote must not be taken for damage.
void check_version(const File& file, const SegmentId& id, const std::string& path) {
  uint8_t header[kHeaderBytes], right[kHeaderBytes];
  encode_segment_header(id, right);
  const Error error = file.read(header, kHeaderBytes, 0);
  if (error == kShortFile) return;
  must(error, "cannot read", path);
  const uint32_t version = load<uint32_t>(header + 8);
  if (memcmp(header, right, 8) == 0 && version != kVersion && digest(header, 56).low == load<uint64_t>(header + 56))
    throw std::runtime_error(path + " is of version " + std::to_string(version) +
                             " and this torchcache knows version 1 only: use a newer torchcache");
}

bool header_is_right(const File& file, const SegmentId& id, const std::string& path) {
  uint8_t header[kHeaderBytes], right[kHeaderBytes];
  encode_segment_header(id, right);
  must(file.read(header, kHeaderBytes, 0), "cannot read", path);
  return memcmp(header, right, kHeaderBytes) == 0;
}

void add_to(Summary* summary, const BlockHeader& header, const std::string& layout) {
  ++summary->blocks;
  auto group = std::find_if(summary->groups.begin(), summary->groups.end(),
                            [&](const RowGroup& g) { return g.codec == header.codec && g.layout == layout; });
  if (group == summary->groups.end()) group = summary->groups.insert(group, {layout, header.codec});
  group->rows += header.rows;
  group->bytes += header.rows * header.row_bytes;
  group->stored += header.payload_bytes;
}

void verify_rows(const Walk& walk, Verified* out) {
  BlockRows rows(walk);
  StoredRow row;
  bool in_damage = false;  // the row before was damaged, too
  while (rows.next(&row)) {
    ++out->rows;
    if (!row.right && in_damage) {
      out->damage.back().bytes += row.length;
      ++out->damage.back().rows;
    } else if (!row.right) {
      out->damage.push_back({Damage::kRows, row.offset, row.length, 1});
    }
    in_damage = !row.right;
  }
}

uint64_t rows_behind(const IndexFile& index, uint64_t segment_bytes) {
  uint64_t rows = 0;
  for (const auto& block : index.blocks())
    if (block.header.end() > segment_bytes) rows += block.header.rows;
  return rows;
}

// An index is good if it is right to its last page and covers no more than there is.
void verify_index(const std::string& directory, const SegmentId& id, uint64_t segment_bytes, Verified* out) {
  FileState state;
  if (path_state(index_path(directory, id), &state) == ENOENT) return;
  IndexFile index;
  const bool right = index.open(directory, id, kMaxSegmentBytes) && index.read([](const std::vector<Entry>&) {});
  if (!right)
    out->damage.push_back({Damage::kIndex, 0, state.size, 0});
  else if (index.covered() > segment_bytes)
    out->damage.push_back(
        {Damage::kCut, segment_bytes, index.covered() - segment_bytes, rows_behind(index, segment_bytes)});
}

}  // namespace

void must(Error error, const std::string& what, const std::string& path) {
  if (error != 0) throw std::runtime_error(what + " " + path + ": " + error_text(error));
}

bool is_idle(const std::string& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
  if (fd < 0) return false;
  struct stat s;
  struct flock lock = {};
  lock.l_type = F_WRLCK;
  const bool known = ::fstat(fd, &s) == 0 && S_ISREG(s.st_mode);
  const bool locks_work = ::fcntl(fd, F_OFD_GETLK, &lock) == 0;
  ::close(fd);
  if (!known) return false;
  if (!locks_work) return ::time(nullptr) - s.st_mtim.tv_sec > kUntouched;
  return s.st_size > 0 && lock.l_type == F_UNLCK;
}

bool remove_idle(const std::string& path) { return is_idle(path) && ::unlink(path.c_str()) == 0; }

Summary summarize(const std::string& directory, const SegmentId& id) {
  Summary summary;
  const std::string path = segment_path(directory, id);
  summary.idle = is_idle(path);
  IndexFile index;
  Walk whole(directory, id);
  summary.bytes = whole.bytes();
  uint64_t from = kHeaderBytes;
  if (index.open(directory, id, summary.bytes)) {
    FileState state;
    if (path_state(index_path(directory, id), &state) == 0) summary.index_bytes = state.size;
    for (const auto& block : index.blocks()) add_to(&summary, block.header, index.layouts()[block.layout]);
    from = std::max(from, index.covered());
  }
  for (Walk rest(directory, id, from); rest.next();) add_to(&summary, rest.header(), rest.layout());
  return summary;
}

// ---- walking

Walk::Walk(const std::string& directory, const SegmentId& id, uint64_t position)
    : path_(segment_path(directory, id)),
      id_(id),
      file_(open_segment(path_)),
      bytes_(size_of(*file_, path_)),
      scanner_(*file_, id, position, bytes_) {
  check_version(*file_, id, path_);
}

std::string Walk::layout() const {
  return {reinterpret_cast<const char*>(scanner_.table()), scanner_.header().layout_bytes};
}

bool Walk::next() {
  const size_t holes = scanner_.holes().size();
  const bool found = scanner_.next();
  std::vector<uint8_t> bytes;
  for (size_t hole = holes == 0 ? 0 : holes - 1; hole < scanner_.holes().size(); ++hole) {
    const Hole& range = scanner_.holes()[hole];
    for (uint64_t at = range.begin; at < range.end; at += bytes.size()) {
      bytes.resize(std::min(kReadBytes, range.end - at));
      must(file_->read(bytes.data(), bytes.size(), at), "cannot read", path_);
    }
  }
  if (!found) check_end();
  return found;
}

// A scanner also stops where it cannot read.
void Walk::check_end() const {
  const uint64_t at = scanner_.position();
  if (at + kHeaderBytes > bytes_) return;
  uint8_t bytes[kHeaderBytes];
  BlockHeader header;
  must(file_->read(bytes, kHeaderBytes, at), "cannot read", path_);
  if (!decode_block_header(bytes, id_, at, &header) || header.end() <= bytes_) must(EIO, "cannot read", path_);
}

BlockRows::BlockRows(const Walk& walk)
    : walk_(walk), header_(walk.header()), table_(walk.table()), offset_(header_.payload_offset()) {}

uint64_t BlockRows::length(uint32_t row) const {
  return table_.lengths == nullptr ? header_.row_bytes : load<uint32_t>(table_.lengths + 4 * uint64_t{row});
}

void BlockRows::read_some() {
  uint64_t size = 0;
  for (end_ = row_; end_ < header_.rows && (end_ == row_ || size + length(end_) <= kReadBytes); ++end_)
    size += length(end_);
  bytes_.resize(size);
  used_ = 0;
  must(walk_.file().read(bytes_.data(), size, offset_), "cannot read", walk_.path());
}

bool BlockRows::next(StoredRow* row) {
  if (row_ == header_.rows) return false;
  if (row_ == end_) read_some();
  const uint64_t size = length(row_), check = load<uint64_t>(table_.checks + 8 * uint64_t{row_});
  *row = {row_, offset_, bytes_.data() + used_, size, walk_.key(row_), check, false};
  row->right = is_right(*row);
  ++row_;
  used_ += size;
  offset_ += size;
  return true;
}

bool BlockRows::is_right(const StoredRow& row) {
  if (row_check(digest(row.data, row.length), row.key) != row.check) return false;
  if (header_.codec == Codec::kRaw || row.length == header_.row_bytes) return true;
  scratch_.resize(header_.row_bytes);
  return decompress_row(row.data, row.length, scratch_.data(), header_.row_bytes);
}

// ---- checking

Verified verify(const std::string& directory, const SegmentId& id, uint64_t position, uint64_t bytes) {
  Verified out;
  const std::string path = segment_path(directory, id);
  const bool idle = is_idle(path);  // asked first: what a finished writer wrote is all there
  Walk walk(directory, id, position);
  if (position == kHeaderBytes && walk.bytes() >= kHeaderBytes && !header_is_right(walk.file(), id, path))
    out.damage.push_back({Damage::kSegmentHeader, 0, kHeaderBytes, 0});
  while (walk.position() - position < bytes && !out.done) {
    out.done = !walk.next();
    if (!out.done) verify_rows(walk, &out);
  }
  out.position = walk.position();
  for (const Hole& hole : walk.holes())
    if (idle || hole.end < out.position) out.damage.push_back({Damage::kBlocks, hole.begin, hole.end - hole.begin, 0});
  if (out.done && idle) verify_index(directory, id, walk.bytes(), &out);
  return out;
}

Digest layout_digest(const BlockHeader& header, const std::string& layout) {
  return digest((layout + std::to_string(header.row_bytes)).data(),
                layout.size() + std::to_string(header.row_bytes).size());
}

size_t RowSet::find(const Digest& row) const {
  size_t slot = static_cast<size_t>(static_cast<unsigned __int128>(row.low * kScramble) * slots_.size() >> 64);
  while (slots_[slot] != Digest{0, 0} && slots_[slot] != row) slot = slot + 1 == slots_.size() ? 0 : slot + 1;
  return slot;
}

void RowSet::grow() {
  std::vector<Digest> old(std::max<size_t>(1024, 2 * slots_.size()));
  old.swap(slots_);
  for (const Digest& row : old)
    if (row != Digest{0, 0}) slots_[find(row)] = row;
}

bool RowSet::has(const Digest& key, const Digest& layout) const {
  const Digest row{key.low ^ layout.low, key.high ^ layout.high};
  return !slots_.empty() && slots_[find(row)] == row;
}

bool RowSet::insert(const Digest& key, const Digest& layout) {
  if (4 * (used_ + 1) > 3 * slots_.size()) grow();
  const Digest row{key.low ^ layout.low, key.high ^ layout.high};
  Digest& slot = slots_[find(row)];
  if (slot == row) return false;
  slot = row;
  ++used_;
  return true;
}

std::vector<Waste> find_waste(const std::string& directory, const std::vector<SegmentId>& ids) {
  std::vector<Waste> waste(ids.size());
  RowSet rows;
  for (size_t i = 0; i < ids.size(); ++i) {
    Walk walk(directory, ids[i]);
    while (walk.next()) {
      const Digest layout = layout_digest(walk.header(), walk.layout());
      for (uint32_t row = 0; row < walk.header().rows; ++row)
        waste[i].duplicates += !rows.insert(walk.key(row), layout);
    }
    waste[i].holes = walk.holes().size();
  }
  return waste;
}

std::vector<Digest> keys_of(const std::string& directory, const SegmentId& id, const std::string& layout) {
  std::vector<Digest> keys;
  for (Walk walk(directory, id); walk.next();) {
    if (walk.layout() != layout) continue;
    for (uint32_t row = 0; row < walk.header().rows; ++row) keys.push_back(walk.key(row));
  }
  return keys;
}

}  // namespace torchcache::store
