// libFuzzer target: any bytes as a segment and as its index, read as a store reads them.
//
// The input is split: its first two bytes say how long the index is, then come the index and the
// segment. Checks are set right before the reader sees them, since no fuzzer guesses a digest:
// every second input keeps its own.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "store/format/bytes.h"
#include "store/format/compression.h"
#include "store/format/index_file.h"
#include "store/format/segment.h"
#include "store/index.h"

using namespace torchcache::store;

namespace {

const SegmentId kId = {1, 2, 3};
const std::vector<uint8_t>* files[2];  // index and segment

// Files are bytes in memory: descriptors tell which.
constexpr int kFirst = 1000000;

int memory_open(const char* path, int, mode_t) {
  const size_t size = strlen(path);
  return kFirst + (strcmp(path + size - 4, ".seg") == 0 ? 1 : 0);
}

int memory_fstat(int fd, struct stat* out) {
  *out = {};
  out->st_mode = S_IFREG;
  out->st_size = static_cast<off_t>(files[fd - kFirst]->size());
  return 0;
}

ssize_t memory_pread(int fd, void* out, size_t size, off_t offset) {
  const std::vector<uint8_t>& bytes = *files[fd - kFirst];
  const size_t at = std::min(static_cast<size_t>(offset), bytes.size());
  size = std::min(size, bytes.size() - at);
  if (size > 0) memcpy(out, bytes.data() + at, size);
  return static_cast<ssize_t>(size);
}

void require(bool holds) {
  if (!holds) std::abort();
}

// What a reader of rows does with a block that was taken.
void read_rows(const File& file, const BlockHeader& header, const uint8_t* table) {
  const Table parts = split_table(header, table);
  std::vector<uint8_t> payload(header.payload_bytes);
  if (file.read(payload.data(), payload.size(), header.payload_offset()) != 0) return;
  if (header.row_bytes > 1 << 20 || header.rows > 1 << 12) return;
  std::vector<uint8_t> row(header.row_bytes);
  uint64_t at = 0;
  for (uint32_t i = 0; i < header.rows; ++i) {
    const uint64_t length = parts.lengths ? parts.length(i) : header.row_bytes;
    require(at + length <= payload.size());
    digest(payload.data() + at, length);
    if (header.codec == Codec::kZstd) decompress_row(payload.data() + at, length, row.data(), row.size());
    at += length;
  }
}

void scan(const File& file, uint64_t size) {
  Scanner scanner(file, kId, kHeaderBytes, size);
  uint64_t position = kHeaderBytes;
  while (scanner.next()) {
    require(scanner.header().end() <= size && scanner.position() > position);
    position = scanner.position();
    read_rows(file, scanner.header(), scanner.table());
  }
  uint64_t end = 0;
  for (const Hole& hole : scanner.holes()) {
    require(hole.begin >= end && hole.begin < hole.end && hole.end <= std::max(size, scanner.position()));
    end = hole.end;
  }
}

void read_index(uint64_t segment_bytes) {
  IndexFile index;
  if (!index.open("", kId, segment_bytes)) return;
  Index rows;
  for (const auto& block : index.blocks()) {
    require(block.header.end() <= segment_bytes && block.layout < index.layouts().size());
    rows.add_block(to_block(block.header, 0, rows.intern(index.layouts()[block.layout])));
  }
  index.read([&](const std::vector<Entry>& entries) {
    for (const Entry& e : entries) require(e.row < rows.block(e.block).rows);
    rows.insert(entries.data(), entries.size(), 0);
  });
}

// ---- checks that are right

void mend_header(std::vector<uint8_t>& segment, size_t at) {
  uint8_t* const header = &segment[at];
  memcpy(header, "\x89TCB", 4);
  save<uint16_t>(header + 4, 1);
  header[6] &= 1;
  header[7] = 0;
  save<uint64_t>(header + 32, at);
  save<uint64_t>(header + 40, 0);
  const Codec codec = static_cast<Codec>(header[6]);
  const uint32_t rows = load<uint32_t>(header + 8), layout = load<uint32_t>(header + 12);
  if (rows <= kMaxRows && layout <= kMaxLayoutBytes) {
    const uint64_t size = table_bytes(codec, rows, layout);
    if (size <= segment.size() - at - kHeaderBytes)
      save<uint64_t>(header + 48, digest(header + kHeaderBytes, size).low);
  }
  uint8_t named[16 + 56];
  memcpy(named, kId.data(), 16);
  memcpy(named + 16, header, 56);
  save<uint64_t>(header + 56, digest(named, sizeof named).low);
}

// A header wherever the fuzzer writes its first letter.
void mend_segment(std::vector<uint8_t>& segment) {
  for (size_t at = kHeaderBytes; at + kHeaderBytes <= segment.size(); at += kAlignment)
    if (segment[at] == 0x89) mend_header(segment, at);
}

void mend_index(std::vector<uint8_t>& index) {
  if (index.size() < kFooterBytes) return;
  uint8_t* const end = index.data() + index.size();
  IndexFooter footer;
  uint8_t* const in = end - kFooterBytes;
  footer.layouts = load<uint32_t>(in + 12);
  footer.covered = load<uint64_t>(in + 32);
  footer.blocks = load<uint32_t>(in + 40);
  footer.rows = load<uint32_t>(in + 44);
  const uint64_t pages = pages_bytes(footer.rows);
  if (pages > index.size() - kFooterBytes) return;
  footer.catalog_check = digest(index.data() + pages, index.size() - kFooterBytes - pages).low;
  for (uint64_t at = 0, number = 0; at < pages; at += kPageBytes, ++number) {
    save<uint64_t>(&index[at + 8], number);
    save<uint64_t>(&index[at], page_check(kId, &index[at], std::min(kPageBytes, pages - at)));
  }
  encode_footer(footer, kId, in);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 3) return 0;
  const bool mended = data[2] % 2 == 0;
  const size_t index_bytes = std::min<size_t>(load<uint16_t>(data), size - 3);
  std::vector<uint8_t> index(data + 3, data + 3 + index_bytes), segment(data + 3 + index_bytes, data + size);
  if (mended) mend_index(index), mend_segment(segment);
  files[0] = &index;
  files[1] = &segment;
  system_calls.open = memory_open;
  system_calls.fstat = memory_fstat;
  system_calls.pread = memory_pread;
  Error error = 0;
  const auto file = File::open(segment_path("", kId), 0, &error);
  require(file != nullptr);
  scan(*file, segment.size());
  read_index(segment.size());
  return 0;
}
