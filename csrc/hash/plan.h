// The launches that make digests and keys of rows, one after the other: whoever calls says how a launch is done. No
// CUDA and no torch here.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "hash/digest.h"
#include "hash/layout.h"
#include "hash/messages.h"

namespace torchcache {

constexpr int64_t kLeaf = kLeafBytes;

// Where the digests of rows go, and what stands before each of them: see Messages.
struct Output {
  Canonical* first;
  int64_t stride;
  bool led;
  Canonical lead;
};

inline int64_t leaves_of(const Rows& rows) { return std::max<int64_t>(1, (rows.bytes + kLeaf - 1) / kLeaf); }

// Digests of space that the leaves of such rows need: none if every row is one leaf.
inline int64_t space_for(const Rows& rows) { return leaves_of(rows) == 1 ? 0 : rows.count * leaves_of(rows); }

inline int64_t space_for(const std::vector<Rows>& several) {
  int64_t most = 0;  // one after the other uses the same space
  for (const Rows& rows : several) most = std::max(most, space_for(rows));
  return most;
}

// What the digests of one level are to the next: rows of so many digests each.
inline Messages digests_of_digests(const Canonical* digests, int64_t rows, int64_t width, const Output& out) {
  const int64_t bytes = width * static_cast<int64_t>(sizeof(Canonical));
  return {adjacent_rows(digests, rows, bytes), bytes, out.first, out.stride, out.led, out.lead};
}

// Row digests.
template <class Launch>
void digest_rows(const Rows& rows, Canonical* space, const Output& out, const Launch& launch) {
  const int64_t leaves = leaves_of(rows);
  if (leaves == 1) return launch(Messages{rows, kLeaf, out.first, out.stride, out.led, out.lead});
  launch(Messages{rows, kLeaf, space, leaves, false, {}});
  launch(digests_of_digests(space, rows.count, leaves, out));
}

// Digests of space that digest_keys needs.
inline int64_t space_for_keys(const std::vector<Rows>& arguments) {
  const auto width = static_cast<int64_t>(arguments.size()) + 1;
  return arguments[0].count * width + space_for(arguments);
}

// Keys of a batch: H(call ‖ row digest of each argument).
template <class Launch>
void digest_keys(const std::vector<Rows>& arguments, Digest call, Canonical* space, Canonical* keys,
                 const Launch& launch) {
  const int64_t batch = arguments[0].count, width = static_cast<int64_t>(arguments.size()) + 1;
  Canonical* const leaves = space + batch * width;
  for (int64_t a = 1; a < width; ++a)
    digest_rows(arguments[a - 1], leaves, Output{space + a, width, a == 1, canonical(call)}, launch);
  launch(digests_of_digests(space, batch, width, Output{keys, 1, false, {}}));
}

}  // namespace torchcache
