#include "hash/keys.h"

#include <cstddef>
#include <map>
#include <memory>
#include <stdexcept>
#include <utility>

#include "core/tensors.h"
#include "hash/cpu.h"
#include "hash/device.h"

namespace torchcache::hash {
namespace {

using core::device_of;
using core::kCpu;
using torch::stable::Tensor;

// Dimension 0 counts the rows, or, with `whole`, the tensor is one row. Alive as long as the tensor is.
Rows rows_of(const Tensor& t, bool whole) {
  if (!core::has_bytes(t)) throw std::invalid_argument("there is no memory behind a tensor (was its storage resized?)");
  return hash::rows_of(t.const_data_ptr(), core::item_size(t), t.sizes(), t.strides(), whole);
}

// One request for each device that a call involves. Every request is enqueued before the first wait.
class DeviceRequests {
 public:
  HashRequest& request(int32_t device) { return requests_[device]; }

  // The request of the one device that holds all `arguments` of a call, or null.
  HashRequest* single_request(size_t arguments) {
    HashRequest* first = requests_.empty() ? nullptr : &requests_.begin()->second;
    return first != nullptr && first->rows.size() == arguments ? first : nullptr;
  }

  void add_samples(const HostProbe& probe) {
    for (const auto& list : probe.lists) request(list->device).samples = list;
  }

  void enqueue() {
    if (requests_.empty()) return;
    if (device_hasher() == nullptr) throw std::invalid_argument("torchcache's native library was built without CUDA");
    for (auto& [device, request] : requests_) pending_[device] = device_hasher()->enqueue(device, std::move(request));
  }

  void wait() {
    for (auto& [device, pending] : pending_) pending->wait();
  }

  // The next `count` digests of a device, after wait().
  std::vector<Digest> next_digests(int32_t device, size_t count) {
    auto [entry, added] = cursors_.try_emplace(device);
    Cursor& cursor = entry->second;
    if (added) cursor.digests = pending_.at(device)->digests();
    const auto begin = cursor.digests.begin() + static_cast<std::ptrdiff_t>(cursor.position);
    cursor.position += count;
    return {begin, begin + static_cast<std::ptrdiff_t>(count)};
  }

  // The host's part of a probe and the devices' parts, after wait().
  int64_t probe(const HostProbe& host) const {
    Mix mix{host.value};
    for (const auto& list : host.lists) {
      const uint64_t* values = pending_.at(list->device)->values();
      for (size_t i = 0; i < list->count; ++i) mix(values[i]);
    }
    return static_cast<int64_t>(mix.value);
  }

 private:
  struct Cursor {
    std::vector<Digest> digests;
    size_t position = 0;
  };

  std::map<int32_t, HashRequest> requests_;
  std::map<int32_t, std::unique_ptr<PendingHash>> pending_;
  std::map<int32_t, Cursor> cursors_;
};

std::vector<int32_t> devices_of(const std::vector<Tensor>& tensors) {
  std::vector<int32_t> devices;
  devices.reserve(tensors.size());
  for (const Tensor& t : tensors) devices.push_back(device_of(t));
  return devices;
}

// The digests of every tensor's rows, in the order of the tensors. The requests have been enqueued, tensor by tensor.
std::vector<std::vector<Digest>> digests_of_each(const std::vector<Tensor>& tensors,
                                                 const std::vector<int32_t>& devices, bool whole,
                                                 DeviceRequests& requests) {
  std::vector<std::vector<Digest>> result(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i)  // while the devices are at work
    if (devices[i] == kCpu) result[i] = row_digests(rows_of(tensors[i], whole));
  requests.wait();
  for (size_t i = 0; i < tensors.size(); ++i) {
    const size_t count = whole ? 1 : static_cast<size_t>(tensors[i].size(0));
    if (devices[i] != kCpu) result[i] = requests.next_digests(devices[i], count);
  }
  return result;
}

int64_t batch_size(const std::vector<Tensor>& rows) {
  if (rows.empty()) throw std::invalid_argument("keys needs at least one tensor");
  const int64_t batch = rows[0].dim() > 0 ? rows[0].size(0) : 0;
  for (const Tensor& t : rows)
    if (t.dim() == 0 || t.size(0) != batch)
      throw std::invalid_argument("all tensors must have the same batch dimension");
  return batch;
}

}  // namespace

HashedBatch hash_batch(const std::vector<Tensor>& rows, Digest call, const Watch* watch) {
  const int64_t batch = batch_size(rows);
  const std::vector<int32_t> devices = devices_of(rows);
  DeviceRequests requests;
  for (size_t i = 0; i < rows.size(); ++i)
    if (devices[i] != kCpu) requests.request(devices[i]).rows.push_back(rows_of(rows[i], /*whole=*/false));
  HashRequest* single = requests.single_request(rows.size());
  if (single != nullptr) single->keyed = true, single->call = call;
  const HostProbe host = watch == nullptr ? HostProbe{} : watch->probe_host();
  requests.add_samples(host);
  requests.enqueue();
  std::vector<Digest> keys;
  if (single != nullptr) {
    requests.wait();
    keys = requests.next_digests(devices[0], static_cast<size_t>(batch));
  } else {
    keys = keys_of_digests(call, digests_of_each(rows, devices, /*whole=*/false, requests), batch);
  }
  return {std::move(keys), requests.probe(host)};
}

std::vector<Digest> digests(const std::vector<Tensor>& tensors) {
  const std::vector<int32_t> devices = devices_of(tensors);
  DeviceRequests requests;
  for (size_t i = 0; i < tensors.size(); ++i)
    if (devices[i] != kCpu) requests.request(devices[i]).rows.push_back(rows_of(tensors[i], /*whole=*/true));
  requests.enqueue();
  std::vector<Digest> result;
  result.reserve(tensors.size());
  for (const auto& one : digests_of_each(tensors, devices, /*whole=*/true, requests)) result.push_back(one[0]);
  return result;
}

int64_t probe(const Watch& watch) {
  const HostProbe host = watch.probe_host();
  DeviceRequests requests;
  requests.add_samples(host);
  requests.enqueue();
  requests.wait();
  return requests.probe(host);
}

}  // namespace torchcache::hash
