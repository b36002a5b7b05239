// One frame a row, so that each row can be read alone; no dictionary, the content size in the
// frame.
#include "store/format/compression.h"

#include <zstd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <system_error>
#include <thread>

namespace torchcache::store {
namespace {

struct Decompressor {
  ZSTD_DCtx* context = ZSTD_createDCtx();
  ~Decompressor() { ZSTD_freeDCtx(context); }
};

}  // namespace

int min_zstd_level() { return ZSTD_minCLevel(); }
int max_zstd_level() { return ZSTD_maxCLevel(); }

Compressor::Compressor(int level, int threads) : level_(level) {
  for (int i = 0; i < threads; ++i) contexts_.push_back(ZSTD_createCCtx());
}

Compressor::~Compressor() {
  for (ZSTD_CCtx* context : contexts_) ZSTD_freeCCtx(context);
}

CompressedRows Compressor::compress(const std::vector<const uint8_t*>& rows, uint64_t row_bytes) {
  CompressedRows out;
  out.bytes.reset(new uint8_t[rows.size() * row_bytes + 1]);
  out.lengths.resize(rows.size());
  uint8_t* const bytes = out.bytes.get();
  const size_t threads = std::min(contexts_.size(), rows.size());
  std::atomic<size_t> next{0};  // a thread that gets less of the processor takes fewer rows
  const auto share = [&](size_t thread) {
    for (size_t row = 0; (row = next.fetch_add(1, std::memory_order_relaxed)) < rows.size();) {
      uint8_t* to = bytes + row * row_bytes;
      const size_t size = ZSTD_compressCCtx(contexts_[thread], to, row_bytes, rows[row], row_bytes, level_);
      const bool smaller = !ZSTD_isError(size) && size < row_bytes;
      if (!smaller) memcpy(to, rows[row], row_bytes);
      out.lengths[row] = static_cast<uint32_t>(smaller ? size : row_bytes);
    }
  };
  std::vector<std::thread> others;
  for (size_t i = 1; i < threads; ++i) {
    try {
      others.emplace_back(share, i);
    } catch (const std::system_error&) {  // no more threads: it only takes longer
    }
  }
  share(0);
  for (std::thread& other : others) other.join();
  for (size_t row = 0; row < rows.size(); ++row) {
    memmove(bytes + out.size, bytes + row * row_bytes, out.lengths[row]);
    out.size += out.lengths[row];
  }
  return out;
}

bool decompress_row(const uint8_t* stored, uint64_t length, uint8_t* out, uint64_t row_bytes) {
  if (length == row_bytes) {
    if (row_bytes > 0) memcpy(out, stored, row_bytes);
    return true;
  }
  if (ZSTD_getFrameContentSize(stored, length) != row_bytes) return false;
  if (ZSTD_findFrameCompressedSize(stored, length) != length) return false;
  static thread_local Decompressor decompressor;
  return ZSTD_decompressDCtx(decompressor.context, out, row_bytes, stored, length) == row_bytes;
}

}  // namespace torchcache::store
