// Rows that tell what they must be, and a store to put them in.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "store/format/format.h"
#include "store/store.h"

#define EXPECT(condition)                                                          \
  do {                                                                             \
    if (!(condition)) {                                                            \
      std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
      std::_Exit(1);                                                               \
    }                                                                              \
  } while (false)

namespace torchcache::store {
namespace {

std::string directory;  // of the running test

constexpr uint64_t kRowBytes = 1000;
const char kLayout[] = "a layout";

Options options() {
  Options o;
  o.directory = directory;
  o.max_bytes = uint64_t{1} << 40;
  o.retry_seconds = 0.01;
  o.patience_seconds = 0.2;
  return o;
}

// Distinct rows that tell what they must be.
struct Rows {
  std::vector<Digest> keys;
  std::vector<uint8_t> bytes;

  Rows(size_t n, uint64_t seed, uint64_t row_bytes = kRowBytes) {
    for (size_t i = 0; i < n; ++i) {
      const uint64_t name[2] = {seed, i};
      keys.push_back(digest(name, sizeof name));
      for (uint64_t b = 0; b < row_bytes; ++b) bytes.push_back(static_cast<uint8_t>((keys[i].low >> (b % 57)) + b * b));
    }
  }
  size_t n() const { return keys.size(); }
  uint64_t row_bytes() const { return bytes.size() / n(); }
};

size_t put(Store& store, const Rows& rows) {
  return store.write(rows.keys.data(), rows.n(), kLayout, {{rows.bytes.data(), rows.row_bytes()}});
}

// How many rows are read; those that are must be right.
size_t right_rows(Store& store, const Rows& rows) {
  std::vector<uint8_t> out(rows.bytes.size()), ok(rows.n());
  store.read(rows.keys.data(), rows.n(), kLayout, {{out.data(), rows.row_bytes()}}, ok.data());
  size_t right = 0;
  for (size_t i = 0; i < rows.n(); ++i) {
    if (!ok[i]) continue;
    ++right;
    const size_t at = i * rows.row_bytes();
    EXPECT(memcmp(&out[at], &rows.bytes[at], rows.row_bytes()) == 0);
  }
  return right;
}

size_t found_rows(Store& store, const Rows& rows) {
  std::vector<uint8_t> present(rows.n());
  store.lookup(rows.keys.data(), rows.n(), present.data());
  size_t found = 0;
  for (uint8_t p : present) found += p;
  return found;
}

}  // namespace
}  // namespace torchcache::store
