// Operations of the disk tier.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "ops/tensors.h"
#include "store/store.h"

namespace torchcache::ops {

// NOLINTBEGIN(performance-unnecessary-value-param): TORCH_BOX passes arguments by value

// Never destroyed, as watches() in keys.h.
inline Handles<store::Store>& stores() {
  static auto* instance = new Handles<store::Store>("store");
  return *instance;
}

inline int64_t store_open(std::string directory, int64_t max_bytes, bool zstd, int64_t level, int64_t threads,
                          bool mmap, int64_t queue_bytes) {
  store::Options options;
  options.directory = std::move(directory);
  options.max_bytes = static_cast<uint64_t>(max_bytes);
  options.zstd = zstd;
  options.zstd_level = static_cast<int>(level);
  options.zstd_threads = static_cast<int>(threads);
  options.mmap = mmap;
  options.queue_bytes = static_cast<uint64_t>(queue_bytes);
  return stores().add(store::Store::open(options));
}

inline std::tuple<Tensor, std::string> store_lookup(int64_t store, Tensor keys) {
  const auto [data, count] = as_keys(keys);
  Tensor present = bool_tensor(count);
  std::string layout = stores().get(store)->lookup(data, count, static_cast<uint8_t*>(present.mutable_data_ptr()));
  return {present, layout};
}

// Leaves of a batch: contiguous on the CPU, dimension 0 counts the rows.
template <class Leaf>
inline std::vector<Leaf> as_leaves(const std::vector<Tensor>& tensors, size_t rows) {
  std::vector<Leaf> leaves;
  for (const Tensor& t : tensors) {
    if (t.dim() == 0 || t.size(0) != static_cast<int64_t>(rows) || !t.is_contiguous() || !t.is_cpu())
      throw std::invalid_argument("leaves must be contiguous CPU tensors with one row for each key");
    const uint64_t bytes = static_cast<uint64_t>(t.numel() * core::item_size(t));
    leaves.push_back({static_cast<uint8_t*>(t.data_ptr()), rows == 0 ? 0 : bytes / rows});
  }
  return leaves;
}

inline Tensor store_read(int64_t store, Tensor keys, std::string layout, std::vector<Tensor> leaves) {
  const auto [data, count] = as_keys(keys);
  Tensor verified = bool_tensor(count);
  stores().get(store)->read(data, count, layout, as_leaves<store::Leaf>(leaves, count),
                            static_cast<uint8_t*>(verified.mutable_data_ptr()));
  return verified;
}

// Leaves and positions without the rows that did not verify.
inline void drop_rows(const std::vector<uint8_t>& verified, const std::vector<core::RowShape>& shapes,
                      std::vector<int64_t>* positions, std::vector<Tensor>* leaves) {
  const auto left = std::count(verified.begin(), verified.end(), 1);
  if (left == static_cast<int64_t>(verified.size())) return;
  for (size_t k = 0; k < leaves->size(); ++k) {
    const Tensor all = (*leaves)[k];
    const auto* from = static_cast<const uint8_t*>(all.const_data_ptr());
    (*leaves)[k] = shapes[k].empty(left, core::kCpu, /*pinned=*/false);
    auto* to = static_cast<uint8_t*>((*leaves)[k].mutable_data_ptr());
    const auto bytes = static_cast<size_t>(shapes[k].row_bytes());
    for (size_t i = 0; i < verified.size(); ++i, from += bytes) {
      if (!verified[i] || bytes == 0) continue;
      memcpy(to, from, bytes);
      to += bytes;
    }
  }
  size_t next = 0;
  for (size_t i = 0; i < verified.size(); ++i)
    if (verified[i]) (*positions)[next++] = (*positions)[i];
  positions->resize(next);
  if (next == 0) leaves->clear();
}

// What to ask the store for after an operation, so that it need not be asked every time.
inline int64_t alerts_of(const store::Store& store) {
  constexpr int64_t kWarnings = 1, kFull = 2;
  const store::Alerts alerts = store.alerts();
  return (alerts.warnings ? kWarnings : 0) | (alerts.full ? kFull : 0);
}

// A read from disk in one operation, as table_hash_and_read is one for memory.
inline std::tuple<Tensor, std::vector<Tensor>, std::string, int64_t> store_lookup_and_read(
    int64_t store, Tensor keys, std::string layout, bool only, std::vector<Tensor> templates, bool pinned) {
  const std::shared_ptr<store::Store> object = stores().get(store);
  const auto [data, count] = as_keys(keys);
  std::vector<uint8_t> present(count);
  const std::string found = object->lookup(data, count, present.data(), only ? layout : "");
  std::vector<int64_t> positions;
  std::vector<Digest> wanted;
  for (size_t i = 0; i < count && found == layout; ++i) {
    if (!present[i]) continue;
    positions.push_back(static_cast<int64_t>(i));
    wanted.push_back(data[i]);
  }
  std::vector<Tensor> leaves;
  if (!wanted.empty()) {
    const std::vector<core::RowShape> shapes(templates.begin(), templates.end());
    for (const core::RowShape& shape : shapes)
      leaves.push_back(shape.empty(static_cast<int64_t>(wanted.size()), core::kCpu, pinned));
    std::vector<uint8_t> verified(wanted.size());
    object->read(wanted.data(), wanted.size(), layout, as_leaves<store::Leaf>(leaves, wanted.size()), verified.data());
    drop_rows(verified, shapes, &positions, &leaves);
  }
  return {int64_tensor(positions), std::move(leaves), found, alerts_of(*object)};
}

inline std::tuple<int64_t, int64_t> store_write(int64_t store, Tensor keys, std::string layout,
                                                std::vector<Tensor> leaves) {
  const std::shared_ptr<store::Store> object = stores().get(store);
  const auto [data, count] = as_keys(keys);
  const size_t admitted = object->write(data, count, layout, as_leaves<store::ConstLeaf>(leaves, count));
  return {static_cast<int64_t>(admitted), alerts_of(*object)};
}

inline void store_flush(int64_t store) { stores().get(store)->flush(); }

inline void store_close(int64_t store) {
  if (auto object = stores().remove(store)) object->close();
}

// In the order of store::Stats.
inline std::vector<int64_t> store_stats(int64_t store) {
  const store::Stats s = stores().get(store)->stats();
  return {static_cast<int64_t>(s.rows),         static_cast<int64_t>(s.bytes_written),
          static_cast<int64_t>(s.queued_rows),  static_cast<int64_t>(s.queued_bytes),
          static_cast<int64_t>(s.damaged_rows), static_cast<int64_t>(s.dropped_rows),
          static_cast<int64_t>(s.full)};
}

inline std::vector<std::string> store_warnings(int64_t store) { return stores().get(store)->drain_warnings(); }

// NOLINTEND(performance-unnecessary-value-param)

}  // namespace torchcache::ops
