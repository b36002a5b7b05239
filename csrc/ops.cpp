// The table of contents of everything native: every operation of torch.ops.torchcache, whose adaptors to the parts that
// do not use torch are in ops/. std::invalid_argument arrives in Python as ValueError, std::out_of_range as IndexError,
// anything else as RuntimeError.
#include <torch/csrc/stable/library.h>

#include "ops/disk.h"
#include "ops/keys.h"
#include "ops/maintenance.h"
#include "ops/memory.h"

STABLE_TORCH_LIBRARY(torchcache, m) {
  // Keys. A digest or key is int64 [2]: low half, high half. Rows and tensors may be on CUDA devices, call and results
  // are on the CPU.
  m.def("keys(Tensor[] rows, int low, int high) -> Tensor");  // rows [B, …] each, the call digest → [B, 2]
  m.def("digests(Tensor[] tensors) -> Tensor");               // N tensors → [N, 2]
  m.def("cuda_architectures() -> int[]");                     // such as 900; none in a library without CUDA

  // State. A watch is a set of tensors that are not expected to change; a probe tells whether one tensor may have.
  m.def("probes(Tensor[] tensors) -> Tensor");  // N tensors → [N]; 0 of a tensor on a device
  m.def("watch_open(Tensor[] tensors) -> int");
  m.def("watch_probe(int watch) -> int");

  // Memory tier. lookup gives slots [B], distinct missing rows [M], layout; find gives layout, slot. hash_and_read
  // gives true and the leaves [B, …] of a batch of which every row is there, else false and keys [B, 2], slots, missing
  // rows; then the layout and the watch's probe.
  m.def("table_open() -> int");
  m.def("table_lookup(int table, Tensor keys) -> (Tensor, Tensor, int)");
  m.def("table_hash_and_read(int table, Tensor[] rows, int low, int high, int watch) -> (bool, Tensor[], int, int)");
  m.def("table_read(int table, Tensor keys) -> (Tensor[], int)");
  m.def("table_add_chunk(int table, int layout, int first, Tensor[] leaves) -> ()");
  m.def("table_write(int table, Tensor keys, int layout, int first, Tensor[] leaves, int max_rows) -> (int, int)");
  m.def("table_insert(int table, Tensor keys, int layout, int first) -> ()");
  m.def("table_find(int table, int low) -> (int, int)");
  m.def("table_low_keys(int table) -> Tensor");

  // Disk tier. lookup gives present [B] and the layout; read gives verified [B]; write gives the number of rows
  // admitted.
  m.def(
      "store_open(str directory, int max_bytes, bool zstd, int level, int threads, bool mmap, int queue_bytes) -> int");
  m.def("store_lookup(int store, Tensor keys) -> (Tensor, str)");
  m.def("store_read(int store, Tensor keys, str layout, Tensor(a!)[] leaves) -> Tensor");
  m.def(
      "store_lookup_and_read(int store, Tensor keys, str layout, bool only, Tensor[] templates, bool pinned) -> "
      "(Tensor, Tensor[], str, int)");
  m.def("store_write(int store, Tensor keys, str layout, Tensor[] leaves) -> (int, int)");
  m.def("store_flush(int store) -> ()");
  m.def("store_stats(int store) -> int[]");
  m.def("store_warnings(int store) -> str[]");

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
}

// Implicit: nothing here is differentiable, so autograd's own layer (2 µs a call) is not needed either.
STABLE_TORCH_LIBRARY_IMPL(torchcache, CompositeImplicitAutograd, m) {
  m.impl("keys", TORCH_BOX(&torchcache::ops::keys));
  m.impl("digests", TORCH_BOX(&torchcache::ops::digests_op));
  m.impl("cuda_architectures", TORCH_BOX(&torchcache::ops::cuda_architectures));
  m.impl("probes", TORCH_BOX(&torchcache::ops::probes));
  m.impl("watch_open", TORCH_BOX(&torchcache::ops::watch_open));
  m.impl("watch_probe", TORCH_BOX(&torchcache::ops::watch_probe));
  m.impl("table_open", TORCH_BOX(&torchcache::ops::table_open));
  m.impl("table_lookup", TORCH_BOX(&torchcache::ops::table_lookup));
  m.impl("table_hash_and_read", TORCH_BOX(&torchcache::ops::table_hash_and_read));
  m.impl("table_read", TORCH_BOX(&torchcache::ops::table_read));
  m.impl("table_add_chunk", TORCH_BOX(&torchcache::ops::table_add_chunk));
  m.impl("table_write", TORCH_BOX(&torchcache::ops::table_write));
  m.impl("table_insert", TORCH_BOX(&torchcache::ops::table_insert));
  m.impl("table_find", TORCH_BOX(&torchcache::ops::table_find));
  m.impl("table_low_keys", TORCH_BOX(&torchcache::ops::table_low_keys));
  m.impl("store_open", TORCH_BOX(&torchcache::ops::store_open));
  m.impl("store_lookup", TORCH_BOX(&torchcache::ops::store_lookup));
  m.impl("store_read", TORCH_BOX(&torchcache::ops::store_read));
  m.impl("store_lookup_and_read", TORCH_BOX(&torchcache::ops::store_lookup_and_read));
  m.impl("store_write", TORCH_BOX(&torchcache::ops::store_write));
  m.impl("store_flush", TORCH_BOX(&torchcache::ops::store_flush));
  m.impl("store_stats", TORCH_BOX(&torchcache::ops::store_stats));
  m.impl("store_warnings", TORCH_BOX(&torchcache::ops::store_warnings));
  m.impl("segment_inspect", TORCH_BOX(&torchcache::ops::segment_inspect));
  m.impl("segment_verify", TORCH_BOX(&torchcache::ops::segment_verify));
  m.impl("segment_waste", TORCH_BOX(&torchcache::ops::segment_waste));
  m.impl("segment_keys", TORCH_BOX(&torchcache::ops::segment_keys));
  m.impl("segment_remove", TORCH_BOX(&torchcache::ops::segment_remove));
  m.impl("compact_open", TORCH_BOX(&torchcache::ops::compact_open));
  m.impl("compact_add", TORCH_BOX(&torchcache::ops::compact_add));
  m.impl("compact_finish", TORCH_BOX(&torchcache::ops::compact_finish));
}

// What finalizers of Python call. They run anywhere, also while torch records a graph, of which an operation would
// become a part; so these are plain C functions.
namespace {

void close_quietly(void (*close)(int64_t), int64_t id) noexcept {
  try {
    close(id);
  } catch (...) {  // NOLINT(bugprone-empty-catch): no exception may pass through C, and nobody waits for this one
  }
}

}  // namespace

#define TORCHCACHE_EXPORT __attribute__((visibility("default")))

extern "C" {

TORCHCACHE_EXPORT void torchcache_watch_close(int64_t id) { close_quietly(torchcache::ops::watch_close, id); }
TORCHCACHE_EXPORT void torchcache_table_close(int64_t id) { close_quietly(torchcache::ops::table_close, id); }
TORCHCACHE_EXPORT void torchcache_store_close(int64_t id) { close_quietly(torchcache::ops::store_close, id); }
TORCHCACHE_EXPORT void torchcache_compaction_close(int64_t id) { close_quietly(torchcache::ops::compact_close, id); }

}  // extern "C"
