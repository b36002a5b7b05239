// Rows to zstd frames and back.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

struct ZSTD_CCtx_s;

namespace torchcache::store {

// The range of levels that this libzstd supports.
int min_zstd_level();
int max_zstd_level();

// Stored rows, one after another.
struct CompressedRows {
  std::unique_ptr<uint8_t[]> bytes;
  std::vector<uint32_t> lengths;  // of each; a row's own size if it is stored raw
  uint64_t size = 0;
};

// Compresses rows of one size, each a frame of its own, by up to `threads` threads. Used by one
// thread at a time. A row that would not become smaller is stored raw.
class Compressor {
 public:
  Compressor(int level, int threads);
  ~Compressor();
  CompressedRows compress(const std::vector<const uint8_t*>& rows, uint64_t row_bytes);

 private:
  const int level_;
  std::vector<ZSTD_CCtx_s*> contexts_;  // one a thread
};

// Whether these stored bytes are a row of `row_bytes`; then it is in `out`. Thread-safe.
bool decompress_row(const uint8_t* stored, uint64_t length, uint8_t* out, uint64_t row_bytes);

}  // namespace torchcache::store
