// The bytes of a store, version 1: encoding and validation as pure functions, no input or output.
// docs/format.md is the specification; where they differ, the page is right.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "hash/digest.h"
#include "store/format/bytes.h"
#include "store/format/names.h"

namespace torchcache::store {

using hash::Digest;
using hash::digest;
using hash::from_canonical;
using hash::to_canonical;

// Blocks and payloads start at multiples of this.
constexpr uint64_t kAlignment = 64;
constexpr uint64_t kHeaderBytes = 64;
constexpr uint64_t kMaxSegmentBytes = uint64_t{2} << 30;
constexpr uint64_t kRotateBytes = uint64_t{1} << 30;
constexpr uint64_t kMaxRowBytes = uint64_t{1} << 30;
constexpr uint32_t kMaxRows = 1 << 20;
constexpr uint32_t kMaxLayoutBytes = 64 << 10;

constexpr uint64_t kBlockBytes = 1 << 20;  // of rows that a writer puts into one block, unless one row is larger

constexpr uint64_t padded(uint64_t size, uint64_t unit) { return (size + unit - 1) / unit * unit; }

enum class Codec : uint8_t { kRaw = 0, kZstd = 1 };

// What each row adds to the table of its block: key, check, stored length.
constexpr uint64_t row_table_bytes(Codec codec) { return codec == Codec::kZstd ? 28 : 24; }
// Bytes that a block takes without any row, at most.
constexpr uint64_t block_overhead(uint64_t layout_bytes) {
  return kHeaderBytes + padded(layout_bytes, 8) + 2 * kAlignment;
}
// Bytes between the header of a block and its payload.
uint64_t table_bytes(Codec codec, uint64_t rows, uint64_t layout_bytes);
// Where the stored lengths of a zstd block stand, counted from the start of the block.
uint64_t lengths_offset(uint64_t rows, uint64_t layout_bytes);

struct BlockHeader {
  Codec codec = Codec::kRaw;
  uint32_t rows = 0;
  uint32_t layout_bytes = 0;
  uint64_t row_bytes = 0;      // of one row, uncompressed
  uint64_t payload_bytes = 0;  // of all rows, as stored, without padding
  uint64_t offset = 0;         // of this block in its segment
  uint64_t table_check = 0;

  uint64_t payload_offset() const {  // in the segment
    return offset + kHeaderBytes + table_bytes(codec, rows, layout_bytes);
  }
  uint64_t end() const { return payload_offset() + padded(payload_bytes, kAlignment); }
};

// Whether every field is one that a block of version 1 may have. Then end() does not overflow or
// pass kMaxSegmentBytes.
bool within_limits(const BlockHeader& header);

// Bytes of a segment's own header. Advisory: no reader needs them.
void encode_segment_header(const SegmentId& id, uint8_t out[kHeaderBytes]);

void encode_block_header(const BlockHeader& header, const SegmentId& id, uint8_t out[kHeaderBytes]);

// False unless these are the bytes of a header at that offset of that segment, within its limits.
bool decode_block_header(const uint8_t in[kHeaderBytes], const SegmentId& id, uint64_t offset, BlockHeader* header);

// The parts of a block's table. They point into the bytes that were given.
struct Table {
  const uint8_t* layout;   // header.layout_bytes
  const uint8_t* keys;     // 16 bytes a row, canonical
  const uint8_t* checks;   // u64 a row
  const uint8_t* lengths;  // u32 a row; null for raw blocks

  Digest key(uint64_t row) const { return from_canonical(keys + 16 * row); }
  uint64_t check(uint64_t row) const { return load<uint64_t>(checks + 8 * row); }
  uint32_t length(uint64_t row) const { return load<uint32_t>(lengths + 4 * row); }  // as stored; of zstd blocks
};
std::string layout_of(const BlockHeader& header, const uint8_t* table);
Table split_table(const BlockHeader& header, const uint8_t* table);

// Whether table_bytes() bytes are the table that this header belongs to, with zero padding and
// stored lengths that fit.
bool table_is_valid(const BlockHeader& header, const uint8_t* table);

// What makes a right row in a wrong place wrong. `stored` is H of the bytes as they are in the
// file.
inline uint64_t row_check(Digest stored, Digest key) {
  return stored.low ^ key.low ^ (key.high << 32 | key.high >> 32);
}

// The index of a segment: pages of sorted rows, a catalog of layouts and blocks, a footer.
constexpr uint64_t kPageBytes = 4096;
constexpr uint64_t kPageHeaderBytes = 16;
// A row in an index; the file holds it as it is in memory.
struct Entry {
  uint64_t low;  // of the key
  uint64_t check;
  uint32_t block;
  uint32_t row;
};
constexpr uint64_t kEntryBytes = 24;
static_assert(sizeof(Entry) == kEntryBytes);
constexpr uint64_t kPageRows = (kPageBytes - kPageHeaderBytes) / kEntryBytes;  // 170
constexpr uint64_t kFooterBytes = 64;
constexpr uint64_t kCatalogBlockBytes = 40;

// Bytes of all pages together; the last one is as short as its rows.
constexpr uint64_t pages_bytes(uint64_t rows) {
  return rows * kEntryBytes + (rows + kPageRows - 1) / kPageRows * kPageHeaderBytes;
}

struct IndexFooter {
  uint32_t layouts = 0;
  uint32_t blocks = 0;
  uint32_t rows = 0;
  uint64_t covered = 0;  // bytes of the segment that this index describes
  uint64_t catalog_check = 0;
};
void encode_footer(const IndexFooter& footer, const SegmentId& id, uint8_t out[kFooterBytes]);
bool decode_footer(const uint8_t in[kFooterBytes], const SegmentId& id, IndexFooter* footer);

// A page begins with its check and its number; the check covers the rest and the segment's id.
uint64_t page_check(const SegmentId& id, const uint8_t* page, size_t page_bytes);

}  // namespace torchcache::store
