#include "store/format/names.h"

namespace torchcache::store {
namespace {

// Ids of all names that are an id and this suffix.
Error list_ids(const std::string& directory, const std::string& suffix, std::vector<SegmentId>* ids) {
  std::vector<std::string> names;
  const Error error = list_directory(directory, &names);
  for (const std::string& name : names) {
    SegmentId id;
    if (name.size() == 32 + suffix.size() && name.compare(32, suffix.size(), suffix) == 0 &&
        from_hex(name.substr(0, 32), &id))
      ids->push_back(id);
  }
  return error;
}

}  // namespace

SegmentId random_id() {
  SegmentId id;
  fill_random(id.data(), id.size());
  return id;
}

std::string to_hex(const SegmentId& id) {
  std::string hex;
  for (uint8_t byte : id) {
    hex += "0123456789abcdef"[byte >> 4];
    hex += "0123456789abcdef"[byte & 15];
  }
  return hex;
}

bool from_hex(const std::string& hex, SegmentId* id) {
  if (hex.size() != 32) return false;
  for (size_t i = 0; i < 32; ++i) {
    const char c = hex[i];
    const bool digit = c >= '0' && c <= '9';
    if (!digit && (c < 'a' || c > 'f')) return false;
    const uint8_t value = static_cast<uint8_t>(digit ? c - '0' : c - 'a' + 10);
    (*id)[i / 2] = static_cast<uint8_t>(i % 2 == 0 ? value << 4 : (*id)[i / 2] | value);
  }
  return true;
}

std::string segment_path(const std::string& directory, const SegmentId& id) {
  return directory + "/" + to_hex(id) + ".seg";
}

std::string index_path(const std::string& directory, const SegmentId& id) {
  return directory + "/" + to_hex(id) + ".idx";
}

std::string temporary_path(const std::string& directory, const SegmentId& id) {
  return directory + "/" + to_hex(id) + ".tmp";
}

Error list_segments(const std::string& directory, std::vector<SegmentId>* ids) {
  return list_ids(directory, ".seg", ids);
}

void sweep_temporaries(const std::string& directory) {
  std::vector<SegmentId> ids;
  list_ids(directory, ".tmp", &ids);
  for (const SegmentId& id : ids) remove_unlocked(temporary_path(directory, id));
}

}  // namespace torchcache::store
