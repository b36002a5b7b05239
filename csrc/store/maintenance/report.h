// Results of maintenance as JSON, in which form they leave the native library: one text for each operation.
#pragma once

#include <string>
#include <vector>

#include "store/maintenance/compaction.h"
#include "store/maintenance/inspect.h"

namespace torchcache::store {

// {"idle", "bytes", "index_bytes", "blocks", "groups": [{"layout", "codec", "rows", "bytes", "stored_bytes"}]}
std::string to_json(const Summary& summary);
// {"position", "done", "rows", "damage": [{"kind", "offset", "bytes", "rows"}]}; rows is null where it cannot be known
std::string to_json(const Verification& verification);
// [{"duplicates", "holes"}]
std::string to_json(const std::vector<Waste>& waste);
// {"rows", "duplicates", "damaged", "removed", "written"}
std::string to_json(const Compaction::Counts& counts);

}  // namespace torchcache::store
