// Row digests and keys on the CPU (docs/format.md, "Keys and digests").
#pragma once

#include <vector>

#include "hash/digest.h"
#include "hash/layout.h"

namespace torchcache::hash {

std::vector<Digest> row_digests(const Rows& rows);

// H(call ‖ row digest of each argument) of each row of a batch; all arguments have as many rows.
std::vector<Digest> keys_of_digests(Digest call, const std::vector<std::vector<Digest>>& arguments, int64_t batch);

}  // namespace torchcache::hash
