// Operations of the memory tier.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "memory/arenas.h"
#include "memory/table.h"
#include "ops/keys.h"
#include "ops/tensors.h"

namespace torchcache::ops {

// NOLINTBEGIN(performance-unnecessary-value-param): TORCH_BOX passes arguments by value

struct MemoryTable {
  memory::KeyTable keys;
  memory::Arenas arenas;
};
// Never destroyed, as watches() in keys.h.
inline Handles<MemoryTable>& tables() {
  static auto* instance = new Handles<MemoryTable>("memory table");
  return *instance;
}

inline int64_t table_open() { return tables().add(std::make_shared<MemoryTable>()); }
inline void table_close(int64_t table) { tables().remove(table); }

inline std::tuple<Tensor, Tensor, int64_t> table_lookup(int64_t table, Tensor keys) {
  const auto [data, count] = as_keys(keys);
  Tensor slots = new_int64(count);
  const memory::Lookup found =
      tables().get(table)->keys.lookup(data, count, static_cast<int64_t*>(slots.mutable_data_ptr()));
  return {slots, int64_tensor(found.missing), found.layout};
}

// The leaves of the rows with these keys if every one is in an arena that can be read here, else none.
inline std::vector<Tensor> leaves_of(const MemoryTable& memory, const memory::Lookup& found,
                                     const std::vector<int64_t>& slots, bool pinned) {
  if (!found.missing.empty() || found.layout < 0) return {};
  return memory.arenas.gather(found.layout, slots.data(), slots.size(), pinned);
}

// What a hit is made of, in one operation: each more would cost a few microseconds, and a wait where rows are on a GPU.
// What goes on to one is gathered in pinned memory.
inline std::tuple<bool, std::vector<Tensor>, int64_t, int64_t> table_hash_and_read(int64_t table,
                                                                                   std::vector<Tensor> rows,
                                                                                   int64_t low, int64_t high,
                                                                                   int64_t watch) {
  const std::shared_ptr<MemoryTable> memory = tables().get(table);
  const std::shared_ptr<hash::Watch> watched = watch == 0 ? nullptr : watches().get(watch);
  const auto [keys, probe] = hash::hash_batch(rows, digest_of(low, high), watched.get());
  std::vector<int64_t> slots(keys.size());
  const memory::Lookup found = memory->keys.lookup(keys.data(), keys.size(), slots.data());
  std::vector<Tensor> leaves = leaves_of(*memory, found, slots, /*pinned=*/rows[0].is_cuda());
  if (!leaves.empty()) return {true, std::move(leaves), found.layout, probe};
  return {false, {keys_tensor(keys), int64_tensor(slots), int64_tensor(found.missing)}, found.layout, probe};
}

inline std::tuple<std::vector<Tensor>, int64_t> table_read(int64_t table, Tensor keys) {
  const std::shared_ptr<MemoryTable> memory = tables().get(table);
  const auto [data, count] = as_keys(keys);
  std::vector<int64_t> slots(count);
  const memory::Lookup found = memory->keys.lookup(data, count, slots.data());
  return {leaves_of(*memory, found, slots, /*pinned=*/false), found.layout};
}

inline void table_insert(int64_t table, Tensor keys, int64_t layout, int64_t first) {
  const auto [data, count] = as_keys(keys);
  tables().get(table)->keys.insert(data, count, layout, first);
}

// Rows that are new are copied to slots from `first` on, and only then found, in one operation as above. A lookup and
// an insertion are two steps: the caller lets one thread write at a time.
inline std::tuple<int64_t, int64_t> table_write(int64_t table, Tensor keys, int64_t layout, int64_t first,
                                                std::vector<Tensor> leaves, int64_t max_rows) {
  const std::shared_ptr<MemoryTable> memory = tables().get(table);
  const auto [data, count] = as_keys(keys);
  std::vector<int64_t> slots(count);
  std::vector<int64_t> rows = memory->keys.lookup(data, count, slots.data()).missing;
  const auto new_rows = static_cast<int64_t>(rows.size());
  rows.resize(std::min(new_rows, max_rows));
  if (rows.empty()) return {0, new_rows};
  if (!memory->arenas.write(layout, first, leaves, rows)) return {-1, new_rows};
  std::vector<Digest> written;
  written.reserve(rows.size());
  for (const int64_t row : rows) written.push_back(data[row]);
  memory->keys.insert(written.data(), written.size(), layout, first);
  return {static_cast<int64_t>(rows.size()), new_rows};
}

inline void table_add_chunk(int64_t table, int64_t layout, int64_t first, std::vector<Tensor> leaves) {
  tables().get(table)->arenas.add(layout, first, leaves);
}

inline std::tuple<int64_t, int64_t> table_find(int64_t table, int64_t low) {
  const memory::RowLocation found = tables().get(table)->keys.find(static_cast<uint64_t>(low));
  return {found.layout, found.slot};
}

inline Tensor table_low_keys(int64_t table) { return int64_tensor(tables().get(table)->keys.low_keys()); }

// NOLINTEND(performance-unnecessary-value-param)

}  // namespace torchcache::ops
