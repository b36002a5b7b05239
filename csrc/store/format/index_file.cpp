// Reading and writing of .idx files: pages first, so that each stands at a multiple of its size.
#include "store/format/index_file.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <unordered_map>

#include "store/format/bytes.h"
#include "store/format/segment.h"

namespace torchcache::store {
namespace {

constexpr uint64_t kPagesAtOnce = 64;

// An index is smaller than what it describes, whatever its footer says.
uint64_t most_bytes(uint64_t segment_bytes) { return 2 * std::min(segment_bytes, kMaxSegmentBytes) + kPageBytes; }

struct Contents {
  std::vector<std::string> layouts;
  std::vector<std::pair<BlockHeader, uint32_t>> blocks;  // with the layout's number
  std::vector<Entry> entries;
  uint64_t covered = kHeaderBytes;
};

void add_block(const BlockHeader& header, const uint8_t* table, std::unordered_map<std::string, uint32_t>* numbers,
               Contents* contents) {
  const Table parts = split_table(header, table);
  const std::string layout = layout_of(header, table);
  const auto [place, added] = numbers->emplace(layout, static_cast<uint32_t>(contents->layouts.size()));
  if (added) contents->layouts.push_back(layout);
  const uint32_t block = static_cast<uint32_t>(contents->blocks.size());
  contents->blocks.emplace_back(header, place->second);
  for (uint32_t row = 0; row < header.rows; ++row)
    contents->entries.push_back({parts.key(row).low, parts.check(row), block, row});
}

Error collect(const std::string& directory, const SegmentId& id, Contents* contents) {
  Error error = 0;
  const auto file = File::open(segment_path(directory, id), 0, &error);
  FileState state;
  if (file == nullptr || (error = file->state(&state)) != 0) return error;
  std::unordered_map<std::string, uint32_t> numbers;
  Scanner scanner(*file, id, kHeaderBytes, state.size);
  while (scanner.next()) add_block(scanner.header(), scanner.table(), &numbers, contents);
  contents->covered = scanner.position();
  std::sort(contents->entries.begin(), contents->entries.end(),
            [](const Entry& a, const Entry& b) { return a.low != b.low ? a.low < b.low : a.block < b.block; });
  return 0;
}

std::vector<uint8_t> encode_catalog(const Contents& contents) {
  std::vector<uint8_t> bytes;
  for (const std::string& layout : contents.layouts) {
    const size_t at = bytes.size();
    bytes.resize(at + catalog_layout_bytes(layout.size()));
    save<uint32_t>(&bytes[at], static_cast<uint32_t>(layout.size()));
    memcpy(&bytes[at] + 4, layout.data(), layout.size());
  }
  for (const auto& [header, layout] : contents.blocks) {
    const size_t at = bytes.size();
    bytes.resize(at + kCatalogBlockBytes);
    save<uint64_t>(&bytes[at], header.offset);
    save<uint64_t>(&bytes[at + 8], header.row_bytes);
    save<uint64_t>(&bytes[at + 16], header.payload_bytes);
    save<uint32_t>(&bytes[at + 24], header.rows);
    save<uint32_t>(&bytes[at + 28], layout);
    save<uint32_t>(&bytes[at + 32], static_cast<uint32_t>(header.codec));
  }
  return bytes;
}

std::vector<uint8_t> encode_page(const SegmentId& id, uint64_t number, const Entry* entries, uint64_t rows) {
  std::vector<uint8_t> page(kPageHeaderBytes + rows * kEntryBytes);
  save<uint64_t>(&page[8], number);
  memcpy(&page[kPageHeaderBytes], entries, rows * kEntryBytes);
  save<uint64_t>(&page[0], page_check(id, page.data(), page.size()));
  return page;
}

Error write_contents(const File& file, const SegmentId& id, const Contents& contents) {
  const uint64_t rows = contents.entries.size();
  uint64_t at = 0;
  std::vector<uint8_t> bytes;
  for (uint64_t first = 0; first < rows; first += kPageRows) {
    const auto page = encode_page(id, first / kPageRows, &contents.entries[first], std::min(kPageRows, rows - first));
    bytes.insert(bytes.end(), page.begin(), page.end());
    if (bytes.size() < kPagesAtOnce * kPageBytes) continue;
    if (const Error error = file.write({{bytes.data(), bytes.size()}}, at)) return error;
    at += bytes.size();
    bytes.clear();
  }
  const std::vector<uint8_t> catalog = encode_catalog(contents);
  bytes.insert(bytes.end(), catalog.begin(), catalog.end());
  IndexFooter footer;
  footer.layouts = static_cast<uint32_t>(contents.layouts.size());
  footer.blocks = static_cast<uint32_t>(contents.blocks.size());
  footer.rows = static_cast<uint32_t>(rows);
  footer.covered = contents.covered;
  footer.catalog_check = digest(catalog.data(), catalog.size()).low;
  bytes.resize(bytes.size() + kFooterBytes);
  encode_footer(footer, id, &bytes[bytes.size() - kFooterBytes]);
  return file.write({{bytes.data(), bytes.size()}}, at);
}

}  // namespace

bool IndexFile::open(const std::string& directory, const SegmentId& id, uint64_t segment_bytes) {
  id_ = id;
  Error error = 0;
  file_ = File::open(index_path(directory, id), 0, &error);
  FileState state;
  if (file_ == nullptr || file_->state(&state) != 0) return false;
  if (state.size < kFooterBytes || state.size > most_bytes(segment_bytes)) return false;
  uint8_t footer[kFooterBytes];
  const uint64_t footer_offset = state.size - kFooterBytes;
  if (file_->read(footer, kFooterBytes, footer_offset) != 0) return false;
  if (!decode_footer(footer, id, &footer_) || footer_.covered > segment_bytes) return false;
  const uint64_t pages = pages_bytes(footer_.rows);
  if (pages > footer_offset) return false;
  std::vector<uint8_t> catalog(footer_offset - pages);
  if (file_->read(catalog.data(), catalog.size(), pages) != 0) return false;
  return digest(catalog.data(), catalog.size()).low == footer_.catalog_check && parse_catalog(catalog);
}

bool IndexFile::parse_catalog(const std::vector<uint8_t>& bytes) {
  const uint8_t* in = bytes.data();
  const uint8_t* const end = in + bytes.size();
  for (uint32_t i = 0; i < footer_.layouts; ++i) {
    if (end - in < 4) return false;
    const uint32_t size = load<uint32_t>(in);
    if (size > kMaxLayoutBytes) return false;
    if (static_cast<uint64_t>(end - in) < catalog_layout_bytes(size)) return false;
    layouts_.emplace_back(reinterpret_cast<const char*>(in) + 4, size);
    in += catalog_layout_bytes(size);
  }
  return parse_blocks(in, end);
}

bool IndexFile::parse_blocks(const uint8_t* in, const uint8_t* end) {
  if (static_cast<uint64_t>(end - in) != footer_.blocks * kCatalogBlockBytes) return false;
  for (; in != end; in += kCatalogBlockBytes) {
    CatalogBlock block;
    block.layout = load<uint32_t>(in + 28);
    const uint32_t codec = load<uint32_t>(in + 32);
    if (block.layout >= layouts_.size() || codec > 1) return false;
    block.header.codec = static_cast<Codec>(codec);
    block.header.rows = load<uint32_t>(in + 24);
    block.header.layout_bytes = static_cast<uint32_t>(layouts_[block.layout].size());
    block.header.row_bytes = load<uint64_t>(in + 8);
    block.header.payload_bytes = load<uint64_t>(in + 16);
    block.header.offset = load<uint64_t>(in);
    if (!within_limits(block.header) || block.header.end() > footer_.covered) return false;
    blocks_.push_back(block);
    block_rows_.push_back(block.header.rows);
  }
  return true;
}

bool IndexFile::parse_page(const uint8_t* page, uint64_t number, uint64_t rows, Entry* out) const {
  const uint64_t size = kPageHeaderBytes + rows * kEntryBytes;
  if (load<uint64_t>(page) != page_check(id_, page, size)) return false;
  if (load<uint64_t>(page + 8) != number) return false;
  memcpy(out, page + kPageHeaderBytes, rows * kEntryBytes);
  return std::all_of(out, out + rows,
                     [&](const Entry& e) { return e.block < block_rows_.size() && e.row < block_rows_[e.block]; });
}

bool IndexFile::read(const std::function<void(const std::vector<Entry>&)>& consume) const {
  const uint64_t all = pages_bytes(footer_.rows);
  std::vector<uint8_t> bytes;
  std::vector<Entry> entries;
  for (uint64_t at = 0; at < all; at += bytes.size()) {
    const uint64_t first = at / kPageBytes * kPageRows;
    bytes.resize(std::min(kPagesAtOnce * kPageBytes, all - at));
    entries.resize(std::min(kPagesAtOnce * kPageRows, footer_.rows - first));
    if (file_->read(bytes.data(), bytes.size(), at) != 0) return false;
    for (uint64_t row = 0, page = 0; row < entries.size(); row += kPageRows, page += kPageBytes) {
      const uint64_t rows = std::min(kPageRows, entries.size() - row);
      if (!parse_page(&bytes[page], (at + page) / kPageBytes, rows, &entries[row])) return false;
    }
    consume(entries);
  }
  return true;
}

Error write_index(const std::string& directory, const SegmentId& id) {
  Contents contents;
  if (const Error error = collect(directory, id, &contents)) return error;
  const std::string temporary = temporary_path(directory, id);
  Error error = 0;
  const auto file = File::create(temporary, &error);  // locked until it has its name: see sweep_temporaries
  if (file == nullptr) return error;
  error = write_contents(*file, id, contents);
  if (error == 0 && system_calls.rename(temporary.c_str(), index_path(directory, id).c_str()) != 0) error = errno;
  if (error != 0) ::unlink(temporary.c_str());
  return error;
}

}  // namespace torchcache::store
