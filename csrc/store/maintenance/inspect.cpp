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

constexpr int64_t kUntouched = int64_t{24} * 3600;  // seconds

bool header_is_valid(const File& file, const SegmentId& id, const std::string& path) {
  uint8_t header[kHeaderBytes], expected[kHeaderBytes];
  encode_segment_header(id, expected);
  throw_on_error(file.read(header, kHeaderBytes, 0), "cannot read", path);
  return memcmp(header, expected, kHeaderBytes) == 0;
}

void add_to(Summary* summary, const BlockHeader& header, const std::string& layout) {
  ++summary->blocks;
  auto group = std::find_if(summary->groups.begin(), summary->groups.end(),
                            [&](const RowGroup& g) { return g.codec == header.codec && g.layout == layout; });
  if (group == summary->groups.end()) group = summary->groups.insert(group, {layout, header.codec});
  group->rows += header.rows;
  group->bytes += header.rows * header.row_bytes;
  group->stored_bytes += header.payload_bytes;
}

void verify_rows(const BlockCursor& blocks, Verification* out) {
  RowCursor rows(blocks);
  StoredRow row;
  bool in_damage = false;  // the row before was damaged, too
  while (rows.next(&row)) {
    ++out->rows;
    if (!row.valid && in_damage) {
      out->damage.back().bytes += row.length;
      ++*out->damage.back().rows;
    } else if (!row.valid) {
      out->damage.push_back({"rows", row.offset, row.length, 1});
    }
    in_damage = !row.valid;
  }
}

std::optional<uint64_t> rows_behind(const IndexFile& index, uint64_t segment_bytes) {
  uint64_t rows = 0;
  for (const auto& block : index.blocks())
    if (block.header.end() > segment_bytes) rows += block.header.rows;
  return rows == 0 ? std::nullopt : std::optional(rows);
}

// An index is good if it is valid to its last page and covers no more than there is.
void verify_index(const std::string& directory, const SegmentId& id, uint64_t segment_bytes, Verification* out) {
  FileState state;
  if (path_state(index_path(directory, id), &state) == ENOENT) return;
  IndexFile index;
  const bool valid = index.open(directory, id, kMaxSegmentBytes) && index.read([](const std::vector<Entry>&) {});
  if (!valid)
    out->damage.push_back({"index", 0, state.size, {}});
  else if (index.covered() > segment_bytes)
    out->damage.push_back(
        {"cut off", segment_bytes, index.covered() - segment_bytes, rows_behind(index, segment_bytes)});
}

}  // namespace

bool is_idle(const std::string& path) {
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
  if (fd < 0) return false;
  struct stat s;
  struct flock lock = {};
  lock.l_type = F_WRLCK;
  const bool is_file = ::fstat(fd, &s) == 0 && S_ISREG(s.st_mode);
  const bool locks_work = ::fcntl(fd, F_OFD_GETLK, &lock) == 0;
  ::close(fd);
  if (!is_file) return false;
  if (!locks_work) return ::time(nullptr) - s.st_mtim.tv_sec > kUntouched;
  return s.st_size > 0 && lock.l_type == F_UNLCK;
}

bool remove_idle(const std::string& path) { return is_idle(path) && ::unlink(path.c_str()) == 0; }

Summary inspect(const std::string& directory, const SegmentId& id) {
  Summary summary;
  const std::string path = segment_path(directory, id);
  summary.idle = is_idle(path);
  IndexFile index;
  BlockCursor whole(directory, id);
  summary.bytes = whole.bytes();
  uint64_t from = kHeaderBytes;
  if (index.open(directory, id, summary.bytes)) {
    FileState state;
    if (path_state(index_path(directory, id), &state) == 0) summary.index_bytes = state.size;
    for (const auto& block : index.blocks()) add_to(&summary, block.header, index.layouts()[block.layout]);
    from = std::max(from, index.covered());
  }
  for (BlockCursor rest(directory, id, from); rest.next();) add_to(&summary, rest.header(), rest.layout());
  return summary;
}

Verification verify(const std::string& directory, const SegmentId& id, uint64_t position, uint64_t bytes) {
  Verification out;
  const std::string path = segment_path(directory, id);
  const bool idle = is_idle(path);  // checked first: what a finished writer wrote is all there
  BlockCursor blocks(directory, id, position);
  if (position == kHeaderBytes && blocks.bytes() >= kHeaderBytes && !header_is_valid(blocks.file(), id, path))
    out.damage.push_back({"segment header", 0, kHeaderBytes, {}});
  while (blocks.position() - position < bytes && !out.done) {
    out.done = !blocks.next();
    if (!out.done) verify_rows(blocks, &out);
  }
  out.position = blocks.position();
  for (const Hole& hole : blocks.holes())
    if (idle || hole.end < out.position) out.damage.push_back({"no block", hole.begin, hole.end - hole.begin, {}});
  if (out.done && idle) verify_index(directory, id, blocks.bytes(), &out);
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
    BlockCursor blocks(directory, ids[i]);
    while (blocks.next()) {
      const Digest layout = layout_digest(blocks.header(), blocks.layout());
      for (uint32_t row = 0; row < blocks.header().rows; ++row)
        waste[i].duplicates += !rows.insert(blocks.key(row), layout);
    }
    waste[i].holes = blocks.holes().size();
  }
  return waste;
}

std::vector<Digest> keys_of(const std::string& directory, const SegmentId& id, const std::string& layout) {
  std::vector<Digest> keys;
  for (BlockCursor blocks(directory, id); blocks.next();) {
    if (blocks.layout() != layout) continue;
    for (uint32_t row = 0; row < blocks.header().rows; ++row) keys.push_back(blocks.key(row));
  }
  return keys;
}

}  // namespace torchcache::store
