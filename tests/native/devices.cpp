// Devices that are not there: CPU tensors that are said to be on one, and a hasher whose teams are loops. Which
// requests each device gets is the code of the library: tests/native/test_devices.py builds and loads this.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "core/tensors.h"
#include "hash/device.h"
#include "hash/keys.h"
#include "hash/plan.h"
#include "hash/watch.h"
#include "loop_team.h"

namespace torchcache::hash {
namespace {

using torch::stable::Tensor;

std::map<const uint8_t*, std::pair<const uint8_t*, int32_t>> places;  // begin of some memory → its end, its device
std::vector<std::string> log;                                         // requests and waits, in order
bool capturing = false;

int32_t place_at(const void* data) {
  const auto* at = static_cast<const uint8_t*>(data);
  auto after = places.upper_bound(at);
  return after == places.begin() || at >= (--after)->second.first ? -1 : after->second.second;
}

void note(const char* what, int32_t device) { log.push_back(what + (" " + std::to_string(device))); }

struct HostSampleList : SampleList {
  HostSampleList(int32_t where, std::vector<Sample> held) : SampleList(where, held.size()), samples(std::move(held)) {}
  std::vector<Sample> samples;
};

// Computes the request only in wait().
class LateHash : public PendingHash {
 public:
  LateHash(int32_t device, HashRequest request) : device_(device), request_(std::move(request)) {
    for (const Rows& rows : request_.rows)
      if (place_at(rows.base) != device) throw std::logic_error("rows of another device");
    note("enqueue", device);
  }

  void wait() override {
    note("wait", device_);
    const auto run = [](const Batch& batch) { launch(batch, Shape{0, 128, 0}); };
    if (request_.keyed) {
      std::vector<Canonical> space(space_for_keys(request_.rows));
      digests_.resize(request_.rows[0].count);
      launch_keys(request_.rows, request_.call, space.data(), digests_.data(), run);
    } else {
      std::vector<Canonical> space(space_for(request_.rows));
      for (const Rows& rows : request_.rows) {
        digests_.resize(digests_.size() + rows.count);
        run(batch_of(rows, space.data(), digests_.data() + digests_.size() - rows.count));
      }
    }
    if (request_.samples == nullptr) return;
    for (const Sample& sample : static_cast<const HostSampleList&>(*request_.samples).samples) {
      if (place_at(sample.at) != device_) throw std::logic_error("samples of another device");
      values_.push_back(sample.value());
    }
  }

  std::vector<Digest> digests() const override {
    std::vector<Digest> result;
    for (const Canonical& one : digests_) result.push_back(number(one));
    return result;
  }
  const uint64_t* values() const override { return values_.data(); }

 private:
  int32_t device_;
  HashRequest request_;
  std::vector<Canonical> digests_;
  std::vector<uint64_t> values_;
};

class LoopHasher : public DeviceHasher {
 public:
  std::unique_ptr<PendingHash> enqueue(int32_t device, HashRequest request) const override {
    if (capturing) throw std::runtime_error("capturing");
    return std::make_unique<LateHash>(device, std::move(request));
  }
  std::shared_ptr<const SampleList> upload_samples(int32_t device, const std::vector<Sample>& samples) const override {
    note("upload", device);
    return std::make_shared<HostSampleList>(device, samples);
  }
  std::vector<int64_t> architectures() const override { return {}; }
};

const bool registered = (register_device_hasher(new LoopHasher), true);
std::map<int64_t, std::unique_ptr<Watch>> watches;

Tensor tensor_of(const std::vector<Digest>& digests) {
  Tensor result = core::new_int64(digests.size(), 2);
  memcpy(result.mutable_data_ptr(), digests.data(), sizeof(Digest) * digests.size());
  return result;
}

void place(Tensor t, int64_t device) {
  const auto* begin = static_cast<const uint8_t*>(t.const_data_ptr());
  places[begin] = {begin + 8 * t.numel(), static_cast<int32_t>(device)};
}

int64_t watch_open(std::vector<Tensor> tensors) {
  watches[watches.size() + 1] = std::make_unique<Watch>(std::move(tensors));
  return static_cast<int64_t>(watches.size());
}

std::tuple<Tensor, int64_t> hash_batch_op(std::vector<Tensor> rows, int64_t low, int64_t high, int64_t watch) {
  const Digest call{static_cast<uint64_t>(low), static_cast<uint64_t>(high)};
  const auto [keys, probe] = hash_batch(rows, call, watch == 0 ? nullptr : watches.at(watch).get());
  return {tensor_of(keys), probe};
}

Tensor digests_op(std::vector<Tensor> tensors) { return tensor_of(digests(tensors)); }
int64_t probe_op(int64_t watch) { return probe(*watches.at(watch)); }
std::vector<std::string> drain_log() { return std::exchange(log, {}); }
void capture(bool now) { capturing = now; }
void forget() { places.clear(), log.clear(), capturing = false; }

}  // namespace
}  // namespace torchcache::hash

// In place of torch's, for this library.
extern "C" AOTITorchError aoti_torch_get_device_type(AtenTensorHandle tensor, int32_t* type) {
  void* data = nullptr;
  aoti_torch_get_data_ptr(tensor, &data);
  *type = torchcache::hash::place_at(data) < 0 ? aoti_torch_device_type_cpu() : aoti_torch_device_type_cuda();
  return 0;
}

extern "C" AOTITorchError aoti_torch_get_device_index(AtenTensorHandle tensor, int32_t* index) {
  void* data = nullptr;
  aoti_torch_get_data_ptr(tensor, &data);
  *index = torchcache::hash::place_at(data);
  return 0;
}

STABLE_TORCH_LIBRARY(torchcache_devices, m) {
  m.def("place(Tensor t, int device) -> ()");  // float64 or int64, contiguous
  m.def("hash_batch(Tensor[] rows, int low, int high, int watch) -> (Tensor, int)");
  m.def("digests(Tensor[] tensors) -> Tensor");
  m.def("watch_open(Tensor[] tensors) -> int");
  m.def("probe(int watch) -> int");
  m.def("drain_log() -> str[]");
  m.def("capture(bool now) -> ()");
  m.def("forget() -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(torchcache_devices, CompositeImplicitAutograd, m) {
  m.impl("place", TORCH_BOX(&torchcache::hash::place));
  m.impl("hash_batch", TORCH_BOX(&torchcache::hash::hash_batch_op));
  m.impl("digests", TORCH_BOX(&torchcache::hash::digests_op));
  m.impl("watch_open", TORCH_BOX(&torchcache::hash::watch_open));
  m.impl("probe", TORCH_BOX(&torchcache::hash::probe_op));
  m.impl("drain_log", TORCH_BOX(&torchcache::hash::drain_log));
  m.impl("capture", TORCH_BOX(&torchcache::hash::capture));
  m.impl("forget", TORCH_BOX(&torchcache::hash::forget));
}
