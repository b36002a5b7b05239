// The table of contents of everything native: the schema block at the end lists every operation of
// torch.ops.torchcache. Above it stand the adaptors between torch's tensors and the parts that do not use torch.
// std::invalid_argument arrives in Python as ValueError, std::out_of_range as IndexError, anything else as
// RuntimeError.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "core/handles.h"
#include "core/tensors.h"
#include "hash/device.h"
#include "hash/keys.h"
#include "hash/watch.h"
#include "memory/arenas.h"
#include "memory/table.h"
#include "store/maintenance/compaction.h"
#include "store/maintenance/inspect.h"
#include "store/maintenance/report.h"
#include "store/store.h"

namespace torchcache {
namespace {

// NOLINTBEGIN(performance-unnecessary-value-param): TORCH_BOX passes arguments by value

using core::Handles;
using core::new_int64;
using hash::Digest;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Deliberately never destroyed: operations may still run in other threads while the process exits.
Handles<hash::Watch>& watches() {
  static auto* instance = new Handles<hash::Watch>("watch");
  return *instance;
}
struct MemoryTable {
  memory::KeyTable keys;
  memory::Arenas arenas;
};
Handles<MemoryTable>& tables() {
  static auto* instance = new Handles<MemoryTable>("memory table");
  return *instance;
}
Handles<store::Store>& stores() {
  static auto* instance = new Handles<store::Store>("store");
  return *instance;
}
Handles<store::Compaction>& compactions() {
  static auto* instance = new Handles<store::Compaction>("compaction");
  return *instance;
}

struct KeyArray {
  const Digest* data;
  size_t count;
};

KeyArray as_keys(const Tensor& keys) {
  if (keys.dim() != 2 || keys.size(1) != 2 || keys.scalar_type() != ScalarType::Long || !keys.is_contiguous() ||
      !keys.is_cpu())
    throw std::invalid_argument("keys must be a contiguous int64 tensor [B, 2] on the CPU");
  return {static_cast<const Digest*>(keys.const_data_ptr()), static_cast<size_t>(keys.size(0))};
}

Tensor int64_tensor(const std::vector<int64_t>& values) {
  Tensor result = new_int64(values.size());
  if (!values.empty()) memcpy(result.mutable_data_ptr(), values.data(), 8 * values.size());
  return result;
}

Tensor bool_tensor(size_t n) { return torch::stable::empty({static_cast<int64_t>(n)}, ScalarType::Bool); }

Tensor keys_tensor(const std::vector<Digest>& keys) {
  Tensor result = new_int64(keys.size(), 2);
  if (!keys.empty()) memcpy(result.mutable_data_ptr(), keys.data(), sizeof(Digest) * keys.size());
  return result;
}

Digest digest_of(int64_t low, int64_t high) { return {static_cast<uint64_t>(low), static_cast<uint64_t>(high)}; }

Tensor keys(std::vector<Tensor> rows, int64_t low, int64_t high) {
  return keys_tensor(hash::hash_batch(rows, digest_of(low, high), nullptr).keys);
}
Tensor digests_op(std::vector<Tensor> tensors) { return keys_tensor(hash::digests(tensors)); }

std::vector<int64_t> cuda_architectures() {
  return hash::device_hasher() == nullptr ? std::vector<int64_t>{} : hash::device_hasher()->architectures();
}

// ---- state

int64_t watch_open(std::vector<Tensor> tensors) {
  return watches().add(std::make_shared<hash::Watch>(std::move(tensors)));
}
int64_t watch_probe(int64_t watch) { return hash::probe(*watches().get(watch)); }
void watch_close(int64_t watch) { watches().remove(watch); }

// ---- memory tier

int64_t table_open() { return tables().add(std::make_shared<MemoryTable>()); }
void table_close(int64_t table) { tables().remove(table); }

std::tuple<Tensor, Tensor, int64_t> table_lookup(int64_t table, Tensor keys) {
  const auto [data, count] = as_keys(keys);
  Tensor slots = new_int64(count);
  const memory::Lookup found =
      tables().get(table)->keys.lookup(data, count, static_cast<int64_t*>(slots.mutable_data_ptr()));
  return {slots, int64_tensor(found.missing), found.layout};
}

// The leaves of the rows with these keys if every one is in an arena that can be read here, else none.
std::vector<Tensor> leaves_of(const MemoryTable& memory, const memory::Lookup& found, const std::vector<int64_t>& slots,
                              bool pinned) {
  if (!found.missing.empty() || found.layout < 0) return {};
  return memory.arenas.gather(found.layout, slots.data(), slots.size(), pinned);
}

// What a hit is made of, in one operation: each more would cost a few microseconds, and a wait where rows are on a GPU.
// What goes on to one is gathered in pinned memory.
std::tuple<bool, std::vector<Tensor>, int64_t, int64_t> table_hash_and_read(int64_t table, std::vector<Tensor> rows,
                                                                            int64_t low, int64_t high, int64_t watch) {
  const std::shared_ptr<MemoryTable> memory = tables().get(table);
  const std::shared_ptr<hash::Watch> watched = watch == 0 ? nullptr : watches().get(watch);
  const auto [keys, probe] = hash::hash_batch(rows, digest_of(low, high), watched.get());
  std::vector<int64_t> slots(keys.size());
  const memory::Lookup found = memory->keys.lookup(keys.data(), keys.size(), slots.data());
  std::vector<Tensor> leaves = leaves_of(*memory, found, slots, /*pinned=*/rows[0].is_cuda());
  if (!leaves.empty()) return {true, std::move(leaves), found.layout, probe};
  return {false, {keys_tensor(keys), int64_tensor(slots), int64_tensor(found.missing)}, found.layout, probe};
}

std::tuple<std::vector<Tensor>, int64_t> table_read(int64_t table, Tensor keys) {
  const std::shared_ptr<MemoryTable> memory = tables().get(table);
  const auto [data, count] = as_keys(keys);
  std::vector<int64_t> slots(count);
  const memory::Lookup found = memory->keys.lookup(data, count, slots.data());
  return {leaves_of(*memory, found, slots, /*pinned=*/false), found.layout};
}

void table_insert(int64_t table, Tensor keys, int64_t layout, int64_t first) {
  const auto [data, count] = as_keys(keys);
  tables().get(table)->keys.insert(data, count, layout, first);
}

// Rows that are new are copied to slots from `first` on, and only then found, in one operation as above. A lookup and
// an insertion are two steps: the caller lets one thread write at a time.
std::tuple<int64_t, int64_t> table_write(int64_t table, Tensor keys, int64_t layout, int64_t first,
                                         std::vector<Tensor> leaves, int64_t most) {
  const std::shared_ptr<MemoryTable> memory = tables().get(table);
  const auto [data, count] = as_keys(keys);
  std::vector<int64_t> slots(count);
  std::vector<int64_t> rows = memory->keys.lookup(data, count, slots.data()).missing;
  const auto found = static_cast<int64_t>(rows.size());
  rows.resize(std::min(found, most));
  if (rows.empty()) return {0, found};
  if (!memory->arenas.write(layout, first, leaves, rows)) return {-1, found};
  std::vector<Digest> written;
  written.reserve(rows.size());
  for (const int64_t row : rows) written.push_back(data[row]);
  memory->keys.insert(written.data(), written.size(), layout, first);
  return {static_cast<int64_t>(rows.size()), found};
}

void table_add_chunk(int64_t table, int64_t layout, int64_t first, std::vector<Tensor> leaves) {
  tables().get(table)->arenas.add(layout, first, leaves);
}

std::tuple<int64_t, int64_t> table_find(int64_t table, int64_t low) {
  const memory::RowLocation found = tables().get(table)->keys.find(static_cast<uint64_t>(low));
  return {found.layout, found.slot};
}

Tensor table_low_keys(int64_t table) { return int64_tensor(tables().get(table)->keys.low_keys()); }

// ---- disk tier

int64_t store_open(std::string directory, int64_t max_bytes, bool zstd, int64_t level, int64_t threads, bool mmap,
                   int64_t queue_bytes) {
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

std::tuple<Tensor, std::string> store_lookup(int64_t store, Tensor keys) {
  const auto [data, count] = as_keys(keys);
  Tensor present = bool_tensor(count);
  std::string layout = stores().get(store)->lookup(data, count, static_cast<uint8_t*>(present.mutable_data_ptr()));
  return {present, layout};
}

// Leaves of a batch: contiguous on the CPU, dimension 0 counts the rows.
template <class Leaf>
std::vector<Leaf> as_leaves(const std::vector<Tensor>& tensors, size_t rows) {
  std::vector<Leaf> leaves;
  for (const Tensor& t : tensors) {
    if (t.dim() == 0 || t.size(0) != static_cast<int64_t>(rows) || !t.is_contiguous() || !t.is_cpu())
      throw std::invalid_argument("leaves must be contiguous CPU tensors with one row for each key");
    const uint64_t bytes = static_cast<uint64_t>(t.numel() * core::item_size(t));
    leaves.push_back({static_cast<uint8_t*>(t.data_ptr()), rows == 0 ? 0 : bytes / rows});
  }
  return leaves;
}

Tensor store_read(int64_t store, Tensor keys, std::string layout, std::vector<Tensor> leaves) {
  const auto [data, count] = as_keys(keys);
  Tensor verified = bool_tensor(count);
  stores().get(store)->read(data, count, layout, as_leaves<store::Leaf>(leaves, count),
                            static_cast<uint8_t*>(verified.mutable_data_ptr()));
  return verified;
}

// Leaves and positions without the rows that did not verify.
void drop_rows(const std::vector<uint8_t>& verified, const std::vector<core::RowShape>& shapes,
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
int64_t alerts_of(const store::Store& store) {
  constexpr int64_t kWarnings = 1, kFull = 2;
  const store::Alerts alerts = store.alerts();
  return (alerts.warnings ? kWarnings : 0) | (alerts.full ? kFull : 0);
}

// A read from disk in one operation, as table_hash_and_read is one for memory.
std::tuple<Tensor, std::vector<Tensor>, std::string, int64_t> store_lookup_and_read(int64_t store, Tensor keys,
                                                                                    std::string layout, bool only,
                                                                                    std::vector<Tensor> like,
                                                                                    bool pinned) {
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
    const std::vector<core::RowShape> shapes(like.begin(), like.end());
    for (const core::RowShape& shape : shapes)
      leaves.push_back(shape.empty(static_cast<int64_t>(wanted.size()), core::kCpu, pinned));
    std::vector<uint8_t> verified(wanted.size());
    object->read(wanted.data(), wanted.size(), layout, as_leaves<store::Leaf>(leaves, wanted.size()), verified.data());
    drop_rows(verified, shapes, &positions, &leaves);
  }
  return {int64_tensor(positions), std::move(leaves), found, alerts_of(*object)};
}

std::tuple<int64_t, int64_t> store_write(int64_t store, Tensor keys, std::string layout, std::vector<Tensor> leaves) {
  const std::shared_ptr<store::Store> object = stores().get(store);
  const auto [data, count] = as_keys(keys);
  const size_t admitted = object->write(data, count, layout, as_leaves<store::ConstLeaf>(leaves, count));
  return {static_cast<int64_t>(admitted), alerts_of(*object)};
}

void store_flush(int64_t store) { stores().get(store)->flush(); }

void store_close(int64_t store) {
  if (auto object = stores().remove(store)) object->close();
}

// In the order of store::Stats.
std::vector<int64_t> store_stats(int64_t store) {
  const store::Stats s = stores().get(store)->stats();
  return {static_cast<int64_t>(s.rows),         static_cast<int64_t>(s.bytes_written),
          static_cast<int64_t>(s.queued_rows),  static_cast<int64_t>(s.queued_bytes),
          static_cast<int64_t>(s.damaged_rows), static_cast<int64_t>(s.dropped_rows),
          static_cast<int64_t>(s.full)};
}

std::vector<std::string> store_warnings(int64_t store) { return stores().get(store)->drain_warnings(); }

// ---- maintenance

store::SegmentId as_id(const std::string& name) {
  store::SegmentId id;
  if (!store::from_hex(name, &id))
    throw std::invalid_argument("a segment is named by 32 lower-case hex digits, got '" + name + "'");
  return id;
}

std::vector<store::SegmentId> as_ids(const std::vector<std::string>& names) {
  std::vector<store::SegmentId> ids;
  ids.reserve(names.size());
  for (const std::string& name : names) ids.push_back(as_id(name));
  return ids;
}

std::string segment_inspect(std::string directory, std::string name) {
  return store::to_json(store::inspect(directory, as_id(name)));
}

std::string segment_verify(std::string directory, std::string name, int64_t position, int64_t bytes) {
  return store::to_json(
      store::verify(directory, as_id(name), static_cast<uint64_t>(position), static_cast<uint64_t>(bytes)));
}

std::string segment_waste(std::string directory, std::vector<std::string> names) {
  return store::to_json(store::find_waste(directory, as_ids(names)));
}

Tensor segment_keys(std::string directory, std::string name, std::string layout) {
  return keys_tensor(store::keys_of(directory, as_id(name), layout));
}

bool segment_remove(std::string path) { return store::remove_idle(path); }

int64_t compact_open(std::string directory, std::vector<std::string> retained) {
  auto compaction = std::make_shared<store::Compaction>(std::move(directory));
  for (const store::SegmentId& id : as_ids(retained)) compaction->retain(id);
  return compactions().add(std::move(compaction));
}

bool compact_add(int64_t compaction, std::string name) {
  return compactions().get(compaction)->add_segment(as_id(name));
}

std::string compact_finish(int64_t compaction) {
  const auto object = compactions().get(compaction);
  object->finish();
  return store::to_json(object->counts());
}

void compact_close(int64_t compaction) { compactions().remove(compaction); }

// NOLINTEND(performance-unnecessary-value-param)

}  // namespace
}  // namespace torchcache

STABLE_TORCH_LIBRARY(torchcache, m) {
  // Keys. A digest or key is int64 [2]: low half, high half. Rows and tensors may be on CUDA devices, call and results
  // are on the CPU.
  m.def("keys(Tensor[] rows, int low, int high) -> Tensor");  // rows [B, …] each, the call digest → [B, 2]
  m.def("digests(Tensor[] tensors) -> Tensor");               // N tensors → [N, 2]
  m.def("cuda_architectures() -> int[]");                     // such as 900; none in a library without CUDA

  // State. A watch is a set of tensors that are not expected to change.
  m.def("watch_open(Tensor[] tensors) -> int");
  m.def("watch_probe(int watch) -> int");
  m.def("watch_close(int watch) -> ()");

  // Memory tier. lookup gives slots [B], distinct missing rows [M], layout; find gives layout, slot. hash_and_read
  // gives true and the leaves [B, …] of a batch of which every row is there, else false and keys [B, 2], slots, missing
  // rows; then the layout and the watch's probe.
  m.def("table_open() -> int");
  m.def("table_lookup(int table, Tensor keys) -> (Tensor, Tensor, int)");
  m.def("table_hash_and_read(int table, Tensor[] rows, int low, int high, int watch) -> (bool, Tensor[], int, int)");
  m.def("table_read(int table, Tensor keys) -> (Tensor[], int)");
  m.def("table_add_chunk(int table, int layout, int first, Tensor[] leaves) -> ()");
  m.def("table_write(int table, Tensor keys, int layout, int first, Tensor[] leaves, int most) -> (int, int)");
  m.def("table_insert(int table, Tensor keys, int layout, int first) -> ()");
  m.def("table_find(int table, int low) -> (int, int)");
  m.def("table_low_keys(int table) -> Tensor");
  m.def("table_close(int table) -> ()");

  // Disk tier. lookup gives present [B] and the layout; read gives verified [B]; write gives the number of rows
  // admitted.
  m.def(
      "store_open(str directory, int max_bytes, bool zstd, int level, int threads, bool mmap, int queue_bytes) -> int");
  m.def("store_lookup(int store, Tensor keys) -> (Tensor, str)");
  m.def("store_read(int store, Tensor keys, str layout, Tensor(a!)[] leaves) -> Tensor");
  m.def(
      "store_lookup_and_read(int store, Tensor keys, str layout, bool only, Tensor[] like, bool pinned) -> "
      "(Tensor, Tensor[], str, int)");
  m.def("store_write(int store, Tensor keys, str layout, Tensor[] leaves) -> (int, int)");
  m.def("store_flush(int store) -> ()");
  m.def("store_stats(int store) -> int[]");
  m.def("store_warnings(int store) -> str[]");
  m.def("store_close(int store) -> ()");

  // Maintenance of a directory. Results with several values are JSON: store/maintenance/report.h. segment_keys gives
  // keys [N, 2]; segment_remove and compact_add give false for a segment that is in use.
  m.def("segment_inspect(str directory, str name) -> str");
  m.def("segment_verify(str directory, str name, int position, int bytes) -> str");
  m.def("segment_waste(str directory, str[] names) -> str");
  m.def("segment_keys(str directory, str name, str layout) -> Tensor");
  m.def("segment_remove(str path) -> bool");
  m.def("compact_open(str directory, str[] retained) -> int");
  m.def("compact_add(int compaction, str name) -> bool");
  m.def("compact_finish(int compaction) -> str");
  m.def("compact_close(int compaction) -> ()");
}

// Implicit: nothing here is differentiable, so autograd's own layer (2 µs a call) is not needed either.
STABLE_TORCH_LIBRARY_IMPL(torchcache, CompositeImplicitAutograd, m) {
  m.impl("keys", TORCH_BOX(&torchcache::keys));
  m.impl("digests", TORCH_BOX(&torchcache::digests_op));
  m.impl("cuda_architectures", TORCH_BOX(&torchcache::cuda_architectures));
  m.impl("watch_open", TORCH_BOX(&torchcache::watch_open));
  m.impl("watch_probe", TORCH_BOX(&torchcache::watch_probe));
  m.impl("watch_close", TORCH_BOX(&torchcache::watch_close));
  m.impl("table_open", TORCH_BOX(&torchcache::table_open));
  m.impl("table_lookup", TORCH_BOX(&torchcache::table_lookup));
  m.impl("table_hash_and_read", TORCH_BOX(&torchcache::table_hash_and_read));
  m.impl("table_read", TORCH_BOX(&torchcache::table_read));
  m.impl("table_add_chunk", TORCH_BOX(&torchcache::table_add_chunk));
  m.impl("table_write", TORCH_BOX(&torchcache::table_write));
  m.impl("table_insert", TORCH_BOX(&torchcache::table_insert));
  m.impl("table_find", TORCH_BOX(&torchcache::table_find));
  m.impl("table_low_keys", TORCH_BOX(&torchcache::table_low_keys));
  m.impl("table_close", TORCH_BOX(&torchcache::table_close));
  m.impl("store_open", TORCH_BOX(&torchcache::store_open));
  m.impl("store_lookup", TORCH_BOX(&torchcache::store_lookup));
  m.impl("store_read", TORCH_BOX(&torchcache::store_read));
  m.impl("store_lookup_and_read", TORCH_BOX(&torchcache::store_lookup_and_read));
  m.impl("store_write", TORCH_BOX(&torchcache::store_write));
  m.impl("store_flush", TORCH_BOX(&torchcache::store_flush));
  m.impl("store_stats", TORCH_BOX(&torchcache::store_stats));
  m.impl("store_warnings", TORCH_BOX(&torchcache::store_warnings));
  m.impl("store_close", TORCH_BOX(&torchcache::store_close));
  m.impl("segment_inspect", TORCH_BOX(&torchcache::segment_inspect));
  m.impl("segment_verify", TORCH_BOX(&torchcache::segment_verify));
  m.impl("segment_waste", TORCH_BOX(&torchcache::segment_waste));
  m.impl("segment_keys", TORCH_BOX(&torchcache::segment_keys));
  m.impl("segment_remove", TORCH_BOX(&torchcache::segment_remove));
  m.impl("compact_open", TORCH_BOX(&torchcache::compact_open));
  m.impl("compact_add", TORCH_BOX(&torchcache::compact_add));
  m.impl("compact_finish", TORCH_BOX(&torchcache::compact_finish));
  m.impl("compact_close", TORCH_BOX(&torchcache::compact_close));
}
