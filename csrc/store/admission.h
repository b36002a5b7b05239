// How many bytes of files rows may take, and how many rows max_bytes admits.
#pragma once

#include <cstddef>
#include <cstdint>

#include "store/options.h"

namespace torchcache::store {

// Bytes that a segment and its index take without any row.
uint64_t segment_cost();

// Bytes of files that each of `rows` rows that are written together may take, at most.
uint64_t row_cost(const Options& options, uint64_t layout_bytes, uint64_t row_bytes, uint64_t rows);

struct Admission {
  size_t rows = 0;        // how many of the first rows fit
  uint64_t row_cost = 0;  // of each of them
};

// Which of `rows` rows fit when `used` bytes of max_bytes are spent.
Admission admit(const Options& options, uint64_t layout_bytes, uint64_t row_bytes, size_t rows, uint64_t used);

}  // namespace torchcache::store
