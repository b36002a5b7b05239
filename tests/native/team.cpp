// The device code of the hash, compiled for the host: a team is a loop over its lanes, a launch a loop over its blocks
// and threads. tests/test_device_hash.py builds and calls this.
#include "hash/team.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "hash/digest.h"
#include "hash/layout.h"
#include "hash/messages.h"
#include "hash/plan.h"

namespace torchcache {
namespace {

class LoopTeam {
 public:
  LoopTeam() {
    for (int i = 0; i < kLanes; ++i) lanes_[i] = Lane(i);
  }

  template <class F>
  void each(const F& f) {
    for (Lane& lane : lanes_) f(lane);
  }
  void exchange() {
    for (Lane& lane : lanes_) lane.value += lanes_[lane.index ^ 1].sum;
    for (Lane& lane : lanes_) lane.sum = 0;
  }
  void collect(uint64_t values[kLanes]) const {
    for (const Lane& lane : lanes_) values[lane.index] = lane.value;
  }
  static bool writes() { return true; }

 private:
  Lane lanes_[kLanes];
};

struct Shape {
  int64_t blocks;  // 0: as many as a launch on a device has
  int threads;

  int64_t blocks_of(const Messages& messages) const {
    return blocks > 0 ? blocks : blocks_for(messages.count(), threads);
  }
};

template <class Source>
void run(const Messages& messages, Shape shape) {
  const int64_t blocks = shape.blocks_of(messages);
  for (int64_t block = 0; block < blocks; ++block)
    for (int thread = 0; thread < shape.threads; ++thread) {
      const Place place = place_of(block, thread, blocks, shape.threads);
      if (place.lane != 0) continue;  // the loop stands for all eight
      LoopTeam team;
      digest_messages<Source>(team, messages, place.first, place.step);
    }
}

void launch(const Messages& messages, Shape shape) {
  with_source(messages.rows, [&](auto source) { run<typename decltype(source)::type>(messages, shape); });
}

struct Numbers {
  const int64_t* values;
  size_t count;
  size_t size() const { return count; }
  int64_t operator[](size_t i) const { return values[i]; }
};

// How often each logical byte of each row is read.
std::vector<int32_t>* reads = nullptr;
const uint8_t* first_row = nullptr;

struct Counting {
  static constexpr int unit() { return 1; }
  const Rows& rows;
  const uint8_t* row;
  int64_t begin;

  Counting(const Rows& all, const uint8_t* start, int64_t at) : rows(all), row(start), begin(at) {}
  uint64_t part(int64_t position) const {
    ++reads->at((row - first_row) / rows.stride * rows.bytes + begin + position);
    return 0;
  }
  uint64_t operator()(int64_t position) const {
    for (int i = 0; i < 8; ++i) part(position + i);
    return 0;
  }
};

void write(const Canonical* digests, int64_t count, uint64_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    const Digest d = number(digests[i]);
    out[2 * i] = d.low, out[2 * i + 1] = d.high;
  }
}

}  // namespace
}  // namespace torchcache

using namespace torchcache;

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
void team_digests(const Argument* tensor, bool whole, int64_t blocks, int threads, uint64_t* out) {
  const Rows rows = tensor->rows(whole);
  std::vector<Canonical> space(space_for(rows)), digests(rows.count);
  digest_rows(rows, space.data(), Output{digests.data(), 1, false, {}},
              [&](const Messages& m) { launch(m, {blocks, threads}); });
  write(digests.data(), rows.count, out);
}

// Keys → out [rows, 2].
void team_keys(const Argument* tensors, int64_t n, uint64_t low, uint64_t high, int64_t blocks, int threads,
               uint64_t* out) {
  std::vector<Rows> arguments;
  for (int64_t i = 0; i < n; ++i) arguments.push_back(tensors[i].rows(false));
  std::vector<Canonical> space(space_for_keys(arguments)), keys(arguments[0].count);
  digest_keys(arguments, {low, high}, space.data(), keys.data(),
              [&](const Messages& m) { launch(m, {blocks, threads}); });
  write(keys.data(), arguments[0].count, out);
}

// How often a launch reads each byte → out [rows, bytes]; -1 where it would read past the end of a row. And how often
// it writes the digest of each message → written [rows, messages].
int team_reads(int64_t rows, int64_t bytes, int64_t longest, int64_t blocks, int threads, int32_t* out) {
  std::vector<int32_t> counts(rows * bytes);
  std::vector<uint8_t> memory(std::max<int64_t>(1, rows * bytes));
  reads = &counts, first_row = memory.data();
  const Rows all = adjacent_rows(memory.data(), rows, bytes);
  Messages messages{all, longest, nullptr, 0, false, {}};
  std::vector<Canonical> digests(messages.count());
  messages.out = digests.data(), messages.out_stride = messages.per_row();
  try {
    run<Counting>(messages, {blocks, threads});
  } catch (const std::out_of_range&) {
    return -1;
  }
  std::copy(counts.begin(), counts.end(), out);
  return 0;
}

int64_t team_blocks(int64_t messages, int threads) { return blocks_for(messages, threads); }

// The mapping alone: for each message number its row, begin and size → out [messages, 3], and how many teams take it
// → takers [messages].
int64_t team_mapping(int64_t rows, int64_t bytes, int64_t longest, int64_t blocks, int threads, int64_t* out,
                     int32_t* takers) {
  const Messages messages{adjacent_rows(nullptr, rows, bytes), longest, nullptr, 0, false, {}};
  const int64_t count = messages.count(), launched = Shape{blocks, threads}.blocks_of(messages);
  for (int64_t i = 0; i < count; ++i) {
    const Message m = message_at(messages, i);
    out[3 * i] = m.row, out[3 * i + 1] = m.begin, out[3 * i + 2] = m.size;
  }
  for (int64_t block = 0; block < launched; ++block)
    for (int thread = 0; thread < threads; ++thread) {
      const Place place = place_of(block, thread, launched, threads);
      for (int64_t i = place.first; i < count; i += place.step) takers[i] |= 1 << place.lane, takers[i] += 256;
    }
  return count;
}

}  // extern "C"
