// The names of the files in a store's directory.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "store/os/file.h"

namespace torchcache::store {

// The name of a segment and of its index, as bytes.
using SegmentId = std::array<uint8_t, 16>;
SegmentId random_id();
std::string to_hex(const SegmentId& id);
bool from_hex(const std::string& hex, SegmentId* id);  // false unless 32 lower-case hex digits

std::string segment_path(const std::string& directory, const SegmentId& id);
std::string index_path(const std::string& directory, const SegmentId& id);
std::string temporary_path(const std::string& directory, const SegmentId& id);

// Ids of all names that are 32 lower-case hex digits and ".seg".
Error list_segments(const std::string& directory, std::vector<SegmentId>* ids);
// Removes unfinished indexes of processes that died while they wrote them: those that nobody locks.
void sweep_temporaries(const std::string& directory);

}  // namespace torchcache::store
