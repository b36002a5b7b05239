// The device code of the hash by teams that are loops: tests/native/test_device_hash.py builds and calls this.
#include "hash/team.h"

#include <algorithm>
#include <cstdint>
#include <vector>

#include "hash/batch.h"
#include "hash/digest.h"
#include "hash/layout.h"
#include "hash/plan.h"
#include "loop_team.h"

namespace torchcache::hash {
namespace {

struct Numbers {
  const int64_t* values;
  size_t count;
  size_t size() const { return count; }
  int64_t operator[](size_t i) const { return values[i]; }
};

// Notes how often each logical byte of each row is read, instead of reading.
struct Counting {
  static std::vector<int32_t>* counts;
  static const uint8_t* memory;
  static bool outside;

  static constexpr int unit() { return 1; }
  const Rows& rows;
  const uint8_t* row;
  int64_t begin;

  Counting(const Rows& all, const uint8_t* start, int64_t at) : rows(all), row(start), begin(at) {}
  uint64_t part(int64_t position) const {
    if (begin + position >= rows.bytes) {
      outside = true;
    } else {
      const int64_t at = row - memory + begin + position;
      __atomic_add_fetch(counts->data() + at, 1, __ATOMIC_RELAXED);
    }
    return 0;
  }
  uint64_t operator()(int64_t position) const {
    for (int i = 0; i < 8; ++i) part(position + i);
    return 0;
  }
};
std::vector<int32_t>* Counting::counts = nullptr;
const uint8_t* Counting::memory = nullptr;
bool Counting::outside = false;

void write(const Canonical* digests, int64_t count, uint64_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    const Digest d = number(digests[i]);
    out[2 * i] = d.low, out[2 * i + 1] = d.high;
  }
}

}  // namespace
}  // namespace torchcache::hash

using namespace torchcache::hash;

struct Argument {  // a tensor
  const void* data;
  int64_t item, dims;
  const int64_t *sizes, *strides;

  Rows rows(bool whole) const {
    const auto n = static_cast<size_t>(dims);
    return rows_of(data, item, Numbers{sizes, n}, Numbers{strides, n}, whole);
  }
};

extern "C" {

// Row digests → out [rows, 2]: low, high.
void team_digests(const Argument* tensor, bool whole, const Shape* shape, uint64_t* out) {
  const Rows rows = tensor->rows(whole);
  std::vector<Canonical> space(space_for(rows)), digests(rows.count);
  launch(batch_of(rows, space.data(), digests.data()), *shape);
  write(digests.data(), rows.count, out);
}

// Keys → out [rows, 2].
void team_keys(const Argument* tensors, int64_t n, uint64_t low, uint64_t high, const Shape* shape, uint64_t* out) {
  std::vector<Rows> arguments;
  for (int64_t i = 0; i < n; ++i) arguments.push_back(tensors[i].rows(false));
  std::vector<Canonical> space(space_for_keys(arguments)), keys(arguments[0].count);
  launch_keys(arguments, {low, high}, space.data(), keys.data(), [&](const Batch& b) { launch(b, *shape); });
  write(keys.data(), arguments[0].count, out);
}

// How often a launch reads each byte → out [rows, bytes]; -1 where it would read past the end of a row.
int team_reads(int64_t rows, int64_t bytes, const Shape* shape, int32_t* out) {
  std::vector<int32_t> counts(rows * bytes);
  std::vector<uint8_t> memory(std::max<int64_t>(1, rows * bytes));
  Counting::counts = &counts, Counting::memory = memory.data(), Counting::outside = false;
  const Rows all = adjacent_rows(memory.data(), rows, bytes);
  std::vector<Canonical> space(space_for(all)), digests(rows);
  run<Counting>(batch_of(all, space.data(), digests.data()), *shape);
  if (Counting::outside) return -1;
  std::copy(counts.begin(), counts.end(), out);
  return 0;
}

int64_t team_blocks(int64_t messages, int threads) { return blocks_for(messages, threads); }

// The mapping alone: for each message number its row, begin and size → out [messages, 3], and which lanes take it, one
// bit each, and how many threads, times 256 → takers [messages].
int64_t team_mapping(int64_t rows, int64_t bytes, const Shape* shape, int64_t* out, int32_t* takers) {
  const Batch batch{adjacent_rows(nullptr, rows, bytes)};
  const int64_t count = batch.messages(), blocks = shape->blocks_of(batch);
  for (int64_t i = 0; i < count; ++i) {
    const Message m = message_at(batch, i);
    out[3 * i] = m.row, out[3 * i + 1] = m.begin, out[3 * i + 2] = m.size;
  }
  for (int64_t block = 0; block < blocks; ++block)
    for (int thread = 0; thread < shape->threads; ++thread) {
      const TeamPosition place = team_position(block, thread, blocks, shape->threads);
      for (int64_t i = place.first; i < count; i += place.step) takers[i] |= 1 << place.lane, takers[i] += 256;
    }
  return count;
}

}  // extern "C"
