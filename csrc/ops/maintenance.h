// Operations that inspect and compact a directory.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "ops/tensors.h"
#include "store/maintenance/compaction.h"
#include "store/maintenance/inspect.h"
#include "store/maintenance/report.h"

namespace torchcache::ops {

// NOLINTBEGIN(performance-unnecessary-value-param): TORCH_BOX passes arguments by value

// Never destroyed, as watches() in keys.h.
inline Handles<store::Compaction>& compactions() {
  static auto* instance = new Handles<store::Compaction>("compaction");
  return *instance;
}

inline store::SegmentId as_id(const std::string& name) {
  store::SegmentId id;
  if (!store::from_hex(name, &id))
    throw std::invalid_argument("a segment is named by 32 lower-case hex digits, got '" + name + "'");
  return id;
}

inline std::vector<store::SegmentId> as_ids(const std::vector<std::string>& names) {
  std::vector<store::SegmentId> ids;
  ids.reserve(names.size());
  for (const std::string& name : names) ids.push_back(as_id(name));
  return ids;
}

inline std::string segment_inspect(std::string directory, std::string name) {
  return store::to_json(store::inspect(directory, as_id(name)));
}

inline std::string segment_verify(std::string directory, std::string name, int64_t position, int64_t bytes) {
  return store::to_json(
      store::verify(directory, as_id(name), static_cast<uint64_t>(position), static_cast<uint64_t>(bytes)));
}

inline std::string segment_waste(std::string directory, std::vector<std::string> names) {
  return store::to_json(store::find_waste(directory, as_ids(names)));
}

inline Tensor segment_keys(std::string directory, std::string name, std::string layout) {
  return keys_tensor(store::keys_of(directory, as_id(name), layout));
}

inline bool segment_remove(std::string path) { return store::remove_idle(path); }

inline int64_t compact_open(std::string directory, std::vector<std::string> retained) {
  auto compaction = std::make_shared<store::Compaction>(std::move(directory));
  for (const store::SegmentId& id : as_ids(retained)) compaction->retain(id);
  return compactions().add(std::move(compaction));
}

inline bool compact_add(int64_t compaction, std::string name) {
  return compactions().get(compaction)->add_segment(as_id(name));
}

inline std::string compact_finish(int64_t compaction) {
  const auto object = compactions().get(compaction);
  object->finish();
  return store::to_json(object->counts());
}

inline void compact_close(int64_t compaction) { compactions().remove(compaction); }

// NOLINTEND(performance-unnecessary-value-param)

}  // namespace torchcache::ops
