// Which team of a launch hashes which bytes, and where the digest goes: no CUDA and no torch here, so that all of it
// can be tested on any machine.
#pragma once

#include <cstdint>
#include <cstring>

#include "hash/digest.h"
#include "hash/layout.h"
#include "hash/team.h"

namespace torchcache {

// The canonical form of a digest, as two words in memory.
struct Canonical {
  uint64_t high, low;
};
static_assert(sizeof(Canonical) == 16);

TORCHCACHE_HD uint64_t swapped(uint64_t v) {
#if defined(__CUDA_ARCH__)
  const uint32_t low = __byte_perm(static_cast<uint32_t>(v), 0, 0x0123);
  return static_cast<uint64_t>(low) << 32 | __byte_perm(static_cast<uint32_t>(v >> 32), 0, 0x0123);
#else
  return __builtin_bswap64(v);
#endif
}

TORCHCACHE_HD Canonical canonical(Digest d) { return {swapped(d.high), swapped(d.low)}; }
inline Digest number(Canonical c) { return {swapped(c.low), swapped(c.high)}; }

// What one launch hashes: rows, each cut in messages of at most `longest` bytes. Leaves, the leaf digests of a row and
// what a key is made of are all that.
struct Messages {
  Rows rows;
  int64_t longest;     // bytes; a multiple of 8
  Canonical* out;      // one for each message
  int64_t out_stride;  // digests from those of a row to those of the next
  bool led;            // whether each row's digests have the `lead` in front of them, to be written too
  Canonical lead;

  TORCHCACHE_HD int64_t per_row() const { return rows.bytes <= longest ? 1 : (rows.bytes + longest - 1) / longest; }
  TORCHCACHE_HD int64_t count() const { return rows.count * per_row(); }
};

// Bytes begin … begin + size of a row.
struct Message {
  int64_t row, index, begin, size;
};

// Messages in the order of rows: teams beside each other take bytes beside each other, and rows of one message each
// fill a machine as well as large ones do.
TORCHCACHE_HD Message message_at(const Messages& all, int64_t number) {
  const int64_t per_row = all.per_row(), row = number / per_row, index = number - row * per_row;
  const int64_t begin = index * all.longest, rest = all.rows.bytes - begin;
  return {row, index, begin, rest < all.longest ? rest : all.longest};
}

// Who a thread of a launch is: one lane of team `first`, which takes every `step`-th message from there on.
struct Place {
  int64_t first, step;
  int lane;
};

TORCHCACHE_HD Place place_of(int64_t block, int thread, int64_t blocks, int threads) {
  const int64_t teams = threads / kLanes;
  return {block * teams + thread / kLanes, blocks * teams, thread % kLanes};
}

// As many blocks as give each message a team, up to more than any GPU runs at once: each team then takes several.
inline int64_t blocks_for(int64_t messages, int threads) {
  constexpr int64_t kMost = 8192;
  const int64_t teams = threads / kLanes, blocks = (messages + teams - 1) / teams;
  return blocks < kMost ? blocks : kMost;
}

// The number in `bytes` bytes at an address that can be divided by that.
template <int bytes>
TORCHCACHE_DEVICE uint64_t read_unit(const uint8_t* p) {
  uint64_t v = 0;
  memcpy(&v, __builtin_assume_aligned(p, bytes), bytes);
  return v;
}

// A message that lies together, in whole units.
template <int bytes>
struct Together {
  TORCHCACHE_DEVICE static constexpr int unit() { return bytes; }
  const uint8_t* start;

  TORCHCACHE_DEVICE Together(const Rows&, const uint8_t* row, int64_t begin) : start(row + begin) {}
  TORCHCACHE_DEVICE uint64_t part(int64_t position) const { return read_unit<bytes>(start + position); }
  TORCHCACHE_DEVICE uint64_t operator()(int64_t position) const {
    uint64_t word = 0;
    TORCHCACHE_UNROLL
    for (int i = 0; i < 8; i += bytes) word |= part(position + i) << (8 * i);
    return word;
  }
};

TORCHCACHE_APART const uint8_t* located(const Rows& rows, const uint8_t* row, int64_t position) {
  return rows.locate(row, position);
}

// A message of a row that does not.
struct Scattered {
  const Rows& rows;
  const uint8_t* row;
  int64_t begin;
  int bytes;

  TORCHCACHE_DEVICE Scattered(const Rows& all, const uint8_t* start, int64_t at)
      : rows(all), row(start), begin(at), bytes(all.unit()) {}
  TORCHCACHE_DEVICE int unit() const { return bytes; }
  TORCHCACHE_DEVICE uint64_t part(int64_t position) const {
    const uint8_t* p = located(rows, row, begin + position);
    switch (bytes) {
      case 1:
        return read_unit<1>(p);
      case 2:
        return read_unit<2>(p);
      case 4:
        return read_unit<4>(p);
      default:
        return read_unit<8>(p);
    }
  }
  TORCHCACHE_DEVICE uint64_t operator()(int64_t position) const {
    uint64_t word = 0;
    TORCHCACHE_ROLLED
    for (int i = 0; i < 8; i += bytes) word |= part(position + i) << (8 * i);
    return word;
  }
};

// A short message, and zeros behind it. Nothing past its end is read.
template <class Source>
struct Padded {
  const Source& source;
  int64_t size;

  TORCHCACHE_DEVICE uint64_t operator()(int64_t position) const {
    uint64_t word = 0;
    TORCHCACHE_ROLLED
    for (int i = 0; i < 8 && position + i < size; i += source.unit()) word |= source.part(position + i) << (8 * i);
    return word;
  }
};

template <class Source, class Team>
TORCHCACHE_DEVICE Digest digest_of(Team& team, const Source& source, int64_t size) {
  constexpr int64_t kShortest = xxh3::kShortest;
  return size >= kShortest ? digest_by_team(team, source, size)
                           : digest_by_team(team, Padded<Source>{source, size}, kShortest);
}

// What one team does.
template <class Source, class Team>
TORCHCACHE_DEVICE void digest_messages(Team& team, const Messages& all, int64_t first, int64_t step) {
  const int64_t count = all.count();
  for (int64_t number = first; number < count; number += step) {
    const Message m = message_at(all, number);
    const Digest digest = digest_of(team, Source(all.rows, all.rows.row(m.row), m.begin), m.size);
    if (!team.writes()) continue;
    Canonical* out = all.out + m.row * all.out_stride + m.index;
    *out = canonical(digest);
    if (all.led && m.index == 0) out[-1] = all.lead;
  }
}

template <class Source>
struct Is {
  using type = Source;
};

// f(Is<the source that reads these rows>).
template <class F>
void with_source(const Rows& rows, const F& f) {
  if (rows.outer > 0) return f(Is<Scattered>());
  switch (rows.unit()) {
    case 1:
      return f(Is<Together<1>>());
    case 2:
      return f(Is<Together<2>>());
    case 4:
      return f(Is<Together<4>>());
    default:
      return f(Is<Together<8>>());
  }
}

}  // namespace torchcache
