// Devices that are not there: CPU tensors that are said to be on one, and answers by teams that are loops. What is
// asked of which device, and how often, is the code of the library: tests/native/test_devices.py builds and loads this.
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

#include "hash/device.h"
#include "hash/keys.h"
#include "hash/new_tensor.h"
#include "hash/plan.h"
#include "hash/watch.h"
#include "loop_team.h"

namespace torchcache {
namespace {

using torch::stable::Tensor;

std::map<const uint8_t*, std::pair<const uint8_t*, int32_t>> places;  // begin of some memory → its end, its device
std::vector<std::string> log;                                         // what the devices were asked, in order
bool capturing = false;

int32_t place_at(const void* data) {
  const auto* at = static_cast<const uint8_t*>(data);
  auto after = places.upper_bound(at);
  return after == places.begin() || at >= (--after)->second.first ? -1 : after->second.second;
}

void note(const char* what, int32_t device) { log.push_back(what + (" " + std::to_string(device))); }

struct HeldList : SampleList {
  HeldList(int32_t where, std::vector<Sample> held) : SampleList(where, held.size()), samples(std::move(held)) {}
  std::vector<Sample> samples;
};

// Does what it is asked only when it is waited for.
class LateAnswer : public Answer {
 public:
  LateAnswer(int32_t device, Question question) : device_(device), question_(std::move(question)) {
    for (const Rows& rows : question_.rows)
      if (place_at(rows.base) != device) throw std::logic_error("rows of another device");
    note("ask", device);
  }

  void wait() override {
    note("wait", device_);
    const auto run = [](const Batch& batch) { launch(batch, Shape{0, 128, 0}); };
    if (question_.keyed) {
      std::vector<Canonical> space(space_for_keys(question_.rows));
      answer_.resize(question_.rows[0].count);
      launch_keys(question_.rows, question_.call, space.data(), answer_.data(), run);
    } else {
      std::vector<Canonical> space(space_for(question_.rows));
      for (const Rows& rows : question_.rows) {
        answer_.resize(answer_.size() + rows.count);
        run(batch_of(rows, space.data(), answer_.data() + answer_.size() - rows.count));
      }
    }
    if (question_.samples == nullptr) return;
    for (const Sample& sample : static_cast<const HeldList&>(*question_.samples).samples) {
      if (place_at(sample.at) != device_) throw std::logic_error("samples of another device");
      values_.push_back(sample.value());
    }
  }

  std::vector<Digest> digests() const override {
    std::vector<Digest> result;
    for (const Canonical& one : answer_) result.push_back(number(one));
    return result;
  }
  const uint64_t* values() const override { return values_.data(); }

 private:
  int32_t device_;
  Question question_;
  std::vector<Canonical> answer_;
  std::vector<uint64_t> values_;
};

class LoopDevice : public Device {
 public:
  std::unique_ptr<Answer> ask(int32_t device, Question question) const override {
    if (capturing) throw std::runtime_error("capturing");
    return std::make_unique<LateAnswer>(device, std::move(question));
  }
  std::shared_ptr<const SampleList> keep(int32_t device, const std::vector<Sample>& samples) const override {
    note("keep", device);
    return std::make_shared<HeldList>(device, samples);
  }
  std::vector<int64_t> architectures() const override { return {}; }
};

const bool registered = (register_cuda(new LoopDevice), true);
std::map<int64_t, std::unique_ptr<Watch>> watches;

Tensor tensor_of(const std::vector<Digest>& digests) {
  Tensor result = new_int64(digests.size(), 2);
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

std::tuple<Tensor, int64_t> see_op(std::vector<Tensor> rows, int64_t low, int64_t high, int64_t watch) {
  const Digest call{static_cast<uint64_t>(low), static_cast<uint64_t>(high)};
  const auto [keys, probe] = see(rows, call, watch == 0 ? nullptr : watches.at(watch).get());
  return {tensor_of(keys), probe};
}

Tensor digests_op(std::vector<Tensor> tensors) { return tensor_of(digests(tensors)); }
int64_t probe_op(int64_t watch) { return probe(*watches.at(watch)); }
std::vector<std::string> take_log() { return std::exchange(log, {}); }
void capture(bool now) { capturing = now; }
void forget() { places.clear(), log.clear(), capturing = false; }

}  // namespace
}  // namespace torchcache

// In place of torch's, for this library.
extern "C" AOTITorchError aoti_torch_get_device_type(AtenTensorHandle tensor, int32_t* type) {
  void* data = nullptr;
  aoti_torch_get_data_ptr(tensor, &data);
  *type = torchcache::place_at(data) < 0 ? aoti_torch_device_type_cpu() : aoti_torch_device_type_cuda();
  return 0;
}

extern "C" AOTITorchError aoti_torch_get_device_index(AtenTensorHandle tensor, int32_t* index) {
  void* data = nullptr;
  aoti_torch_get_data_ptr(tensor, &data);
  *index = torchcache::place_at(data);
  return 0;
}

STABLE_TORCH_LIBRARY(torchcache_devices, m) {
  m.def("place(Tensor t, int device) -> ()");  // float64 or int64, contiguous
  m.def("see(Tensor[] rows, int low, int high, int watch) -> (Tensor, int)");
  m.def("digests(Tensor[] tensors) -> Tensor");
  m.def("watch_open(Tensor[] tensors) -> int");
  m.def("probe(int watch) -> int");
  m.def("take_log() -> str[]");
  m.def("capture(bool now) -> ()");
  m.def("forget() -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(torchcache_devices, CompositeImplicitAutograd, m) {
  m.impl("place", TORCH_BOX(&torchcache::place));
  m.impl("see", TORCH_BOX(&torchcache::see_op));
  m.impl("digests", TORCH_BOX(&torchcache::digests_op));
  m.impl("watch_open", TORCH_BOX(&torchcache::watch_open));
  m.impl("probe", TORCH_BOX(&torchcache::probe_op));
  m.impl("take_log", TORCH_BOX(&torchcache::take_log));
  m.impl("capture", TORCH_BOX(&torchcache::capture));
  m.impl("forget", TORCH_BOX(&torchcache::forget));
}
