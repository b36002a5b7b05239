// The .idx file of a segment: what a scan of it would find, sorted. Lost or damaged, it is derived
// again by a scan.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "store/format/format.h"
#include "store/os/file.h"

namespace torchcache::store {

// Bytes of an index, without the padding of its layouts.
constexpr uint64_t index_file_bytes(uint64_t rows, uint64_t blocks, uint64_t layout_bytes) {
  return pages_bytes(rows) + layout_bytes + blocks * kCatalogBlockBytes + kFooterBytes;
}
// What one layout takes in the catalog.
constexpr uint64_t catalog_layout_bytes(uint64_t layout_bytes) { return padded(4 + layout_bytes, 8); }

// An index as it is read: first the catalog, then page after page.
class IndexFile {
 public:
  struct CatalogBlock {
    BlockHeader header;  // without its table check
    uint32_t layout;     // number in layouts()
  };

  // False unless footer and catalog are right, and what is covered is no more than the segment.
  bool open(const std::string& directory, const SegmentId& id, uint64_t segment_bytes);

  const std::vector<std::string>& layouts() const { return layouts_; }
  const std::vector<CatalogBlock>& blocks() const { return blocks_; }
  uint64_t rows() const { return footer_.rows; }
  uint64_t covered() const { return footer_.covered; }

  // Gives the rows in order of their keys, some thousands at a time, all checked; Entry::block is a
  // number in blocks(). False at the first page that is not right.
  bool read(const std::function<void(const std::vector<Entry>&)>& consume) const;

 private:
  bool parse_catalog(const std::vector<uint8_t>& bytes);
  bool parse_blocks(const uint8_t* in, const uint8_t* end);
  bool parse_page(const uint8_t* page, uint64_t number, uint64_t rows, Entry* out) const;

  SegmentId id_;
  IndexFooter footer_;
  std::shared_ptr<File> file_;
  std::vector<std::string> layouts_;
  std::vector<CatalogBlock> blocks_;
  std::vector<uint32_t> block_rows_;  // of each, close together: looked up for every row
};

// Scans a segment that grows no more and writes its index: under a temporary name, then renamed.
// Leaves the segment without one after an error. Takes 24 bytes of memory a row.
Error write_index(const std::string& directory, const SegmentId& id);

}  // namespace torchcache::store
