// Encoding and validation of headers, tables and indexes.
#include "store/format/format.h"

#include <cstring>
#include <vector>

#include "store/format/bytes.h"

namespace torchcache::store {
namespace {

constexpr uint8_t kSegmentMagic[8] = {0x89, 'T', 'C', 'S', 'E', 'G', '\r', '\n'};
constexpr uint8_t kIndexMagic[8] = {0x89, 'T', 'C', 'I', 'D', 'X', '\r', '\n'};
constexpr uint8_t kBlockMagic[4] = {0x89, 'T', 'C', 'B'};
constexpr uint32_t kVersion = 1;

// H of the segment's id followed by the first 56 bytes of a header.
uint64_t header_check(const SegmentId& id, const uint8_t* header) {
  uint8_t bytes[16 + 56];
  memcpy(bytes, id.data(), 16);
  memcpy(bytes + 16, header, 56);
  return digest(bytes, sizeof bytes).low;
}

bool all_zero(const uint8_t* begin, const uint8_t* end) {
  for (; begin != end; ++begin)
    if (*begin != 0) return false;
  return true;
}

// Every row's stored length is at most the row's, and they add up to the payload.
bool lengths_fit(const BlockHeader& h, const Table& table) {
  uint64_t sum = 0;
  for (uint32_t row = 0; row < h.rows; ++row) {
    const uint64_t length = table.length(row);
    if (length > h.row_bytes) return false;
    sum += length;
  }
  return sum == h.payload_bytes;
}

}  // namespace

bool within_limits(const BlockHeader& h) {
  if (h.rows < 1 || h.rows > kMaxRows || h.layout_bytes > kMaxLayoutBytes) return false;
  if (h.row_bytes > kMaxRowBytes || h.payload_bytes > kMaxSegmentBytes) return false;
  const uint64_t all = h.rows * h.row_bytes;  // at most 2^50
  if (h.codec == Codec::kRaw ? h.payload_bytes != all : h.payload_bytes > all) return false;
  if (h.offset > kMaxSegmentBytes || h.offset % kAlignment != 0) return false;
  return h.end() <= kMaxSegmentBytes;
}

uint64_t lengths_offset(uint64_t rows, uint64_t layout_bytes) {
  return kHeaderBytes + padded(layout_bytes, 8) + 24 * rows;
}

uint64_t table_bytes(Codec codec, uint64_t rows, uint64_t layout_bytes) {
  const uint64_t lengths = codec == Codec::kZstd ? 4 * rows : 0;
  return padded(lengths_offset(rows, layout_bytes) - kHeaderBytes + lengths, kAlignment);
}

void encode_segment_header(const SegmentId& id, uint8_t out[kHeaderBytes]) {
  memset(out, 0, kHeaderBytes);
  memcpy(out, kSegmentMagic, 8);
  save<uint32_t>(out + 8, kVersion);
  save<uint32_t>(out + 12, kHeaderBytes);
  memcpy(out + 16, id.data(), 16);
  save<uint64_t>(out + 56, digest(out, 56).low);
}

void encode_block_header(const BlockHeader& h, const SegmentId& id, uint8_t out[kHeaderBytes]) {
  memset(out, 0, kHeaderBytes);
  memcpy(out, kBlockMagic, 4);
  save<uint16_t>(out + 4, kVersion);
  out[6] = static_cast<uint8_t>(h.codec);
  save<uint32_t>(out + 8, h.rows);
  save<uint32_t>(out + 12, h.layout_bytes);
  save<uint64_t>(out + 16, h.row_bytes);
  save<uint64_t>(out + 24, h.payload_bytes);
  save<uint64_t>(out + 32, h.offset);
  save<uint64_t>(out + 48, h.table_check);
  save<uint64_t>(out + 56, header_check(id, out));
}

bool decode_block_header(const uint8_t in[kHeaderBytes], const SegmentId& id, uint64_t offset, BlockHeader* h) {
  if (memcmp(in, kBlockMagic, 4) != 0 || load<uint16_t>(in + 4) != kVersion) return false;
  if (in[6] > static_cast<uint8_t>(Codec::kZstd) || in[7] != 0) return false;
  if (load<uint64_t>(in + 32) != offset || load<uint64_t>(in + 40) != 0) return false;
  if (load<uint64_t>(in + 56) != header_check(id, in)) return false;
  h->codec = static_cast<Codec>(in[6]);
  h->rows = load<uint32_t>(in + 8);
  h->layout_bytes = load<uint32_t>(in + 12);
  h->row_bytes = load<uint64_t>(in + 16);
  h->payload_bytes = load<uint64_t>(in + 24);
  h->offset = offset;
  h->table_check = load<uint64_t>(in + 48);
  return within_limits(*h);
}

std::string layout_of(const BlockHeader& header, const uint8_t* table) {
  return {reinterpret_cast<const char*>(table), header.layout_bytes};
}

Table split_table(const BlockHeader& h, const uint8_t* table) {
  Table parts;
  parts.layout = table;
  parts.keys = table + padded(h.layout_bytes, 8);
  parts.checks = parts.keys + uint64_t{16} * h.rows;
  parts.lengths = h.codec == Codec::kZstd ? parts.checks + uint64_t{8} * h.rows : nullptr;
  return parts;
}

bool table_is_valid(const BlockHeader& h, const uint8_t* table) {
  const uint64_t size = table_bytes(h.codec, h.rows, h.layout_bytes);
  if (digest(table, size).low != h.table_check) return false;
  const Table parts = split_table(h, table);
  if (!all_zero(table + h.layout_bytes, parts.keys)) return false;
  const uint8_t* used = parts.checks + uint64_t{8} * h.rows;
  if (h.codec == Codec::kZstd) used += uint64_t{4} * h.rows;
  if (!all_zero(used, table + size)) return false;
  return h.codec == Codec::kRaw || lengths_fit(h, parts);
}

void encode_footer(const IndexFooter& footer, const SegmentId& id, uint8_t out[kFooterBytes]) {
  memcpy(out, kIndexMagic, 8);
  save<uint32_t>(out + 8, kVersion);
  save<uint32_t>(out + 12, footer.layouts);
  memcpy(out + 16, id.data(), 16);
  save<uint64_t>(out + 32, footer.covered);
  save<uint32_t>(out + 40, footer.blocks);
  save<uint32_t>(out + 44, footer.rows);
  save<uint64_t>(out + 48, footer.catalog_check);
  save<uint64_t>(out + 56, digest(out, 56).low);
}

bool decode_footer(const uint8_t in[kFooterBytes], const SegmentId& id, IndexFooter* footer) {
  if (memcmp(in, kIndexMagic, 8) != 0 || load<uint32_t>(in + 8) != kVersion) return false;
  if (memcmp(in + 16, id.data(), 16) != 0 || load<uint64_t>(in + 56) != digest(in, 56).low) return false;
  footer->layouts = load<uint32_t>(in + 12);
  footer->covered = load<uint64_t>(in + 32);
  footer->blocks = load<uint32_t>(in + 40);
  footer->rows = load<uint32_t>(in + 44);
  footer->catalog_check = load<uint64_t>(in + 48);
  return footer->covered <= kMaxSegmentBytes && footer->covered % kAlignment == 0;
}

uint64_t page_check(const SegmentId& id, const uint8_t* page, size_t page_bytes) {
  uint8_t bytes[16 + kPageBytes];
  memcpy(bytes, id.data(), 16);
  memcpy(bytes + 16, page + 8, page_bytes - 8);
  return digest(bytes, 16 + page_bytes - 8).low;
}

}  // namespace torchcache::store
