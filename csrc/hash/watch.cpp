#include "hash/watch.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <utility>

#include "core/tensors.h"

namespace torchcache::hash {
namespace {

using torch::stable::Tensor;

// Elements before the one at a logical position.
int64_t offset_of(int64_t position, const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  int64_t offset = 0;
  for (size_t d = sizes.size(); d-- > 0; position /= sizes[d]) offset += position % sizes[d] * strides[d];
  return offset;
}

// The samples that a probe reads of a tensor, none if it has no bytes. Mixes in the tensor's address and shape.
struct TensorSamples {
  static constexpr int64_t kLine =
      Sample::kMaxBytes;                        // what the processor fetches at once costs as much as a part of it
  static constexpr int64_t kWhole = 4 * kLine;  // bytes of a tensor that is read in full
  static constexpr int64_t kApart = 16;         // elements of one that does not lie together

  std::array<Sample, kApart> list;
  size_t count = 0;

  TensorSamples(const Tensor& t, Mix& mix) {
    const auto* data = static_cast<const uint8_t*>(t.const_data_ptr());
    const int64_t item = core::item_size(t);
    mix(reinterpret_cast<uintptr_t>(data));
    mix(static_cast<uint64_t>(t.scalar_type()));
    const auto sizes = t.sizes(), strides = t.strides();
    int64_t n = 1, last = 0;
    for (size_t d = 0; d < sizes.size(); ++d) {
      mix(static_cast<uint64_t>(sizes[d]));
      mix(static_cast<uint64_t>(strides[d]));
      n *= sizes[d], last += (sizes[d] - 1) * strides[d];
    }
    if (n == 0 || data == nullptr || !core::has_bytes(t, last, item)) return;
    const int64_t bytes = n * item;
    if (last != n - 1) {
      for (int64_t i = 0; i < kApart; ++i) add(data + offset_of((n - 1) * i / (kApart - 1), t) * item, item);
    } else if (bytes <= kWhole) {
      for (int64_t at = 0; at < bytes; at += kLine) add(data + at, std::min(kLine, bytes - at));
    } else {
      for (const int64_t at : {int64_t{0}, bytes / 3, bytes / 2 + bytes / 7, bytes - kLine}) add(line(data, at), kLine);
    }
  }

  void mix_values(Mix& mix) const {
    for (size_t i = 0; i < count; ++i) mix(list[i].value());
  }

 private:
  // One line of the processor, unless that begins before the data.
  static const uint8_t* line(const uint8_t* data, int64_t at) {
    const int64_t before = static_cast<int64_t>(reinterpret_cast<uintptr_t>(data + at) % kLine);
    return data + std::max<int64_t>(0, at - before);
  }

  void add(const uint8_t* at, int64_t bytes) { list[count++] = {at, static_cast<uint64_t>(bytes)}; }
};

std::vector<std::shared_ptr<const SampleList>> upload(const std::map<int32_t, std::vector<Sample>>& samples) {
  std::vector<std::shared_ptr<const SampleList>> lists;
  lists.reserve(samples.size());
  for (const auto& [device, list] : samples) lists.push_back(device_hasher()->upload_samples(device, list));
  return lists;
}

}  // namespace

Watch::Watch(std::vector<Tensor> tensors) : tensors_(std::move(tensors)) {}

HostProbe Watch::probe_host() const {
  Mix mix;
  std::map<int32_t, std::vector<Sample>> on_devices;
  for (const Tensor& t : tensors_) {
    const TensorSamples samples(t, mix);
    if (t.is_cpu()) {
      samples.mix_values(mix);
    } else if (device_hasher() != nullptr && t.is_cuda()) {
      mix(samples.count);  // a list must not outlive the bytes
      auto& of_device = on_devices[t.get_device_index()];
      of_device.insert(of_device.end(), samples.list.begin(), samples.list.begin() + samples.count);
    }
  }
  if (on_devices.empty()) return {mix.value, {}};
  core::MutexLock lock(mutex_);
  if (lists_.empty() || listed_ != mix.value) lists_ = upload(on_devices), listed_ = mix.value;
  return {mix.value, lists_};
}

int64_t probe_on_host(const Tensor& t) {
  Mix mix;
  const TensorSamples samples(t, mix);
  if (!t.is_cpu()) return 0;
  samples.mix_values(mix);
  return static_cast<int64_t>(mix.value | 1);
}

}  // namespace torchcache::hash
