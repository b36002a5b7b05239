// H by eight lanes, as a GPU computes it: one team of eight threads hashes one message, lane i the i-th eight bytes of
// each stripe. What the lanes do is written once, for a team of threads (cuda.cu) and for one that is a loop (the
// tests).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "hash/digest.h"
#include "hash/layout.h"
#include "hash/xxh3.h"

namespace torchcache::hash {

constexpr int kLanes = 8;

#if defined(__CUDACC__)
#define TORCHCACHE_TABLE __device__ const
#else
#define TORCHCACHE_TABLE constexpr
#endif

// The secret in steps of eight bytes: in stripe j of a block lane i takes word j + i, at the scramble word 16 + i.
#define TORCHCACHE_EIGHT(f, at) \
  f(at), f((at) + 8), f((at) + 16), f((at) + 24), f((at) + 32), f((at) + 40), f((at) + 48), f((at) + 56)
TORCHCACHE_TABLE uint64_t kSecretWords[24] = {TORCHCACHE_EIGHT(xxh3::secret64, 0), TORCHCACHE_EIGHT(xxh3::secret64, 64),
                                              TORCHCACHE_EIGHT(xxh3::secret64, 128)};
TORCHCACHE_TABLE uint64_t kLastWords[kLanes] = {TORCHCACHE_EIGHT(xxh3::secret64, xxh3::last_secret(0))};
TORCHCACHE_TABLE uint64_t kStart[kLanes] = {xxh3::kPrime32_3, xxh3::kPrime64_1, xxh3::kPrime64_2, xxh3::kPrime64_3,
                                            xxh3::kPrime64_4, xxh3::kPrime32_2, xxh3::kPrime64_5, xxh3::kPrime32_1};

// One of the eight accumulators. A team's `exchange` moves `sum`, which belongs to the neighbour i ^ 1, into that one's
// `value`, once a block: between two scrambles everything is addition modulo 2^64, so it may be late.
struct Lane {
  int index;
  uint64_t value, sum;
  uint64_t secret[xxh3::kStripesPerBlock];

  TORCHCACHE_DEVICE explicit Lane(int i = 0) : index(i), value(0), sum(0) {
    TORCHCACHE_UNROLL
    for (size_t j = 0; j < xxh3::kStripesPerBlock; ++j) secret[j] = kSecretWords[j + i];
  }

  TORCHCACHE_DEVICE void start() { value = kStart[index], sum = 0; }

  TORCHCACHE_DEVICE void accumulate(uint64_t data, uint64_t key) {
    value += xxh3::product(data, key);
    sum += data;
  }

  TORCHCACHE_DEVICE void scramble() { value = xxh3::scramble(value, kSecretWords[xxh3::kStripesPerBlock + index]); }

  // The first `stripes` of the block that begins at `at`. All are read before one is used: so many reads are on their
  // way at once.
  template <class Words>
  TORCHCACHE_DEVICE void block(const Words& words, int64_t at, int stripes) {
    uint64_t data[xxh3::kStripesPerBlock];
    TORCHCACHE_UNROLL
    for (int j = 0; j < static_cast<int>(xxh3::kStripesPerBlock); ++j)
      data[j] = j < stripes ? words(at + j * static_cast<int64_t>(xxh3::kStripe) + 8 * index) : 0;
    TORCHCACHE_UNROLL
    for (int j = 0; j < static_cast<int>(xxh3::kStripesPerBlock); ++j)
      if (j < stripes) accumulate(data[j], secret[j]);
  }
};

// H of a message of `size` ≥ kShortest bytes of which words(position) gives the eight from there on.
// A team has each(f), which calls f(lane) for every lane; exchange(); and collect(values), which gives the values of
// all lanes to the lane that finishes.
template <class Team, class Words>
TORCHCACHE_DEVICE Digest digest_by_team(Team& team, const Words& words, int64_t size) {
  constexpr int64_t kBlock = xxh3::kBlock, kStripe = xxh3::kStripe;
  constexpr int kStripes = xxh3::kStripesPerBlock;
  const int64_t blocks = (size - 1) / kBlock, tail = blocks * kBlock;
  const int stripes = static_cast<int>((size - tail - 1) / kStripe);
  team.each([](Lane& lane) { lane.start(); });
  for (int64_t at = 0; at < tail; at += kBlock) {
    team.each([&](Lane& lane) { lane.block(words, at, kStripes); });
    team.exchange();
    team.each([](Lane& lane) { lane.scramble(); });
  }
  team.each([&](Lane& lane) {
    const uint64_t last = words(size - kStripe + 8 * lane.index);
    lane.block(words, tail, stripes);
    lane.accumulate(last, kLastWords[lane.index]);
  });
  team.exchange();
  uint64_t values[kLanes];
  team.collect(values);
  const auto length = static_cast<uint64_t>(size);
  return {xxh3::finish_low(values, length), xxh3::finish_high(values, length)};
}

}  // namespace torchcache::hash
