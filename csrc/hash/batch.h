// What one launch does: which team hashes which bytes, and where the digests go. No CUDA and no torch here, so that all
// of it can be tested on any machine.
#pragma once

#include <cstdint>

#include "hash/digest.h"
#include "hash/layout.h"
#include "hash/sources.h"
#include "hash/team.h"

namespace torchcache::hash {

constexpr int64_t kLeaf = kLeafBytes;

// The canonical form of a digest, as two words in memory.
struct Canonical {
  uint64_t high, low;
};
static_assert(sizeof(Canonical) == 16);

TORCHCACHE_HD uint64_t swapped(uint64_t v) {
  v = (v & 0x00FF00FF00FF00FF) << 8 | (v >> 8 & 0x00FF00FF00FF00FF);
  v = (v & 0x0000FFFF0000FFFF) << 16 | (v >> 16 & 0x0000FFFF0000FFFF);
  return v << 32 | v >> 32;
}

TORCHCACHE_HD Canonical canonical(Digest d) { return {swapped(d.high), swapped(d.low)}; }
inline Digest number(Canonical c) { return {swapped(c.low), swapped(c.high)}; }

// Rows, and where their digests go. Every leaf is a message of its own for a team; the team that hashes the last leaf
// of a row goes on to the row's digest, and from the last argument of a call on to the key. So small rows fill a
// machine as well as large ones do, and there is one launch for each argument.
struct Batch {
  Rows rows;
  Canonical* leaves = nullptr;   // [rows, leaves of a row]: their digests, unless a row is one leaf
  uint32_t* done = nullptr;      // [rows], zeros: how many of those are there
  Canonical* digests = nullptr;  // of row i at digests[i * stride]
  int64_t stride = 1;
  // For keys a row of `stride` digests is what a key is made of: of the call, of the first argument, of the second, …
  bool first = false;         // the first argument: the digest of the call goes before the row's
  Canonical call{};           // that
  Canonical* keys = nullptr;  // the last argument: [rows], the digest of all of it

  TORCHCACHE_HD int64_t leaves_per_row() const { return rows.bytes <= kLeaf ? 1 : (rows.bytes + kLeaf - 1) / kLeaf; }
  TORCHCACHE_HD int64_t messages() const { return rows.count * leaves_per_row(); }
};

// Bytes begin … begin + size of a row: its leaf of that index.
struct Message {
  int64_t row, index, begin, size;
};

// Leaves in the order of rows: neighbouring teams hash neighbouring bytes.
TORCHCACHE_HD Message message_at(const Batch& batch, int64_t number) {
  const int64_t per_row = batch.leaves_per_row(), row = number / per_row, index = number - row * per_row;
  const int64_t begin = index * kLeaf, rest = batch.rows.bytes - begin;
  return {row, index, begin, rest < kLeaf ? rest : kLeaf};
}

// Which thread of a launch is which: one lane of team `first`, which hashes every `step`-th message from there on.
struct TeamPosition {
  int64_t first, step;
  int lane;
};

TORCHCACHE_HD TeamPosition team_position(int64_t block, int thread, int64_t blocks, int threads) {
  const int64_t teams = threads / kLanes;
  return {block * teams + thread / kLanes, blocks * teams, thread % kLanes};
}

// As many blocks as give each message a team, up to more than any GPU runs at once: each team then hashes several.
inline int64_t blocks_for(int64_t messages, int threads) {
  constexpr int64_t kMaxBlocks = 8192;
  const int64_t teams = threads / kLanes, blocks = (messages + teams - 1) / teams;
  return blocks < kMaxBlocks ? blocks : kMaxBlocks;
}

template <class Source, class Team>
TORCHCACHE_DEVICE Digest digest_of(Team& team, const Source& source, int64_t size) {
  constexpr int64_t kShortest = xxh3::kShortest;
  return size >= kShortest ? digest_by_team(team, source, size)
                           : digest_by_team(team, Padded<Source>{source, size}, kShortest);
}

template <class Team>
TORCHCACHE_DEVICE Digest digest_of_digests(Team& team, const Canonical* first, int64_t count) {
  const Written source{reinterpret_cast<const uint8_t*>(first)};
  return digest_of(team, source, count * static_cast<int64_t>(sizeof(Canonical)));
}

// From the digest of a row to its key, in the launch of the last argument.
template <class Team>
TORCHCACHE_DEVICE void finish_row(Team& team, const Batch& batch, int64_t row, Digest digest) {
  Canonical* out = batch.digests + row * batch.stride;
  if (team.writes()) {
    *out = canonical(digest);
    if (batch.first) out[-1] = batch.call;
  }
  if (batch.keys == nullptr) return;
  team.settle();
  const Digest key = digest_of_digests(team, out + 1 - batch.stride, batch.stride);
  if (team.writes()) batch.keys[row] = canonical(key);
}

// What one team does. Besides what digest_by_team needs, it has writes(), true for the one thread that writes;
// settle(), after which what that one wrote is visible to all of the team; and last(counter, n), which settles, counts,
// and tells all of the team whether theirs was the last of n, for whom all that the other n - 1 wrote is visible.
template <class Source, class Team>
TORCHCACHE_DEVICE void digest_batch(Team& team, const Batch& batch, int64_t first, int64_t step) {
  const int64_t messages = batch.messages(), per_row = batch.leaves_per_row();
  for (int64_t number = first; number < messages; number += step) {
    const Message m = message_at(batch, number);
    Digest digest = digest_of(team, Source(batch.rows, batch.rows.row(m.row), m.begin), m.size);
    if (per_row > 1) {
      Canonical* leaves = batch.leaves + m.row * per_row;
      if (team.writes()) leaves[m.index] = canonical(digest);
      if (!team.last(batch.done + m.row, per_row)) continue;
      digest = digest_of_digests(team, leaves, per_row);
    }
    finish_row(team, batch, m.row, digest);
  }
}

}  // namespace torchcache::hash
