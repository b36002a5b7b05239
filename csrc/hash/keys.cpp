#include "hash/keys.h"

#include <cstddef>
#include <map>
#include <memory>
#include <stdexcept>
#include <utility>

#include "hash/cpu.h"
#include "hash/device.h"
#include "hash/tensors.h"

namespace torchcache {
namespace {

using torch::stable::Tensor;

// The devices of a call: each is asked before one is waited for.
class Devices {
 public:
  Question& question(int32_t device) { return questions_[device]; }

  // The one device that has all rows of a call with so many arguments, or null.
  Question* only(size_t arguments) {
    Question* first = questions_.empty() ? nullptr : &questions_.begin()->second;
    return first != nullptr && first->rows.size() == arguments ? first : nullptr;
  }

  void look_at(const Look& look) {
    for (const auto& list : look.lists) question(list->device).samples = list;
  }

  void ask() {
    if (questions_.empty()) return;
    if (cuda() == nullptr) throw std::invalid_argument("torchcache's native library was built without CUDA");
    for (auto& [device, question] : questions_) answers_[device] = cuda()->ask(device, std::move(question));
  }

  void wait() {
    for (auto& [device, answer] : answers_) answer->wait();
  }

  // The next digests of a device, after wait().
  std::vector<Digest> take(int32_t device, size_t count) {
    auto [found, first] = digests_.try_emplace(device);
    Taken& from = found->second;
    if (first) from.all = answers_.at(device)->digests();
    const auto begin = from.all.begin() + static_cast<std::ptrdiff_t>(from.taken);
    from.taken += count;
    return {begin, begin + static_cast<std::ptrdiff_t>(count)};
  }

  int64_t probe(const Look& look) const {
    Mix mix{look.value};
    for (const auto& list : look.lists) {
      const uint64_t* values = answers_.at(list->device)->values();
      for (size_t i = 0; i < list->count; ++i) mix(values[i]);
    }
    return static_cast<int64_t>(mix.value);
  }

 private:
  struct Taken {
    std::vector<Digest> all;
    size_t taken = 0;
  };

  std::map<int32_t, Question> questions_;
  std::map<int32_t, std::unique_ptr<Answer>> answers_;
  std::map<int32_t, Taken> digests_;
};

// Where each tensor is.
std::vector<int32_t> places_of(const std::vector<Tensor>& tensors) {
  std::vector<int32_t> places;
  places.reserve(tensors.size());
  for (const Tensor& t : tensors) places.push_back(device_of(t));
  return places;
}

// The digests of every tensor's rows, in the order of the tensors; those of a device are asked for already, tensor by
// tensor.
std::vector<std::vector<Digest>> digests_of_each(const std::vector<Tensor>& tensors, const std::vector<int32_t>& places,
                                                 bool whole, Devices& devices) {
  std::vector<std::vector<Digest>> result(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i)  // while the devices are at work
    if (places[i] == kCpu) result[i] = row_digests(rows_of(tensors[i], whole));
  devices.wait();
  for (size_t i = 0; i < tensors.size(); ++i)
    if (places[i] != kCpu) result[i] = devices.take(places[i], whole ? 1 : static_cast<size_t>(tensors[i].size(0)));
  return result;
}

}  // namespace

Seen see(const std::vector<Tensor>& rows, Digest call, const Watch* watch) {
  if (rows.empty()) throw std::invalid_argument("keys needs at least one tensor");
  const int64_t batch = rows[0].dim() > 0 ? rows[0].size(0) : 0;
  const std::vector<int32_t> places = places_of(rows);
  Devices devices;
  for (size_t i = 0; i < rows.size(); ++i) {
    if (rows[i].dim() == 0 || rows[i].size(0) != batch)
      throw std::invalid_argument("all tensors must have the same batch dimension");
    if (places[i] != kCpu) devices.question(places[i]).rows.push_back(rows_of(rows[i], /*whole=*/false));
  }
  Question* only = devices.only(rows.size());
  if (only != nullptr) only->keyed = true, only->call = call;
  const Look look = watch == nullptr ? Look{} : watch->look();
  devices.look_at(look);
  devices.ask();
  std::vector<Digest> keys;
  if (only != nullptr) {
    devices.wait();
    keys = devices.take(places[0], static_cast<size_t>(batch));
  } else {
    keys = keys_of_digests(call, digests_of_each(rows, places, /*whole=*/false, devices), batch);
  }
  return {std::move(keys), devices.probe(look)};
}

std::vector<Digest> digests(const std::vector<Tensor>& tensors) {
  const std::vector<int32_t> places = places_of(tensors);
  Devices devices;
  for (size_t i = 0; i < tensors.size(); ++i)
    if (places[i] != kCpu) devices.question(places[i]).rows.push_back(rows_of(tensors[i], /*whole=*/true));
  devices.ask();
  std::vector<Digest> result;
  result.reserve(tensors.size());
  for (const auto& one : digests_of_each(tensors, places, /*whole=*/true, devices)) result.push_back(one[0]);
  return result;
}

int64_t probe(const Watch& watch) {
  const Look look = watch.look();
  Devices devices;
  devices.look_at(look);
  devices.ask();
  devices.wait();
  return devices.probe(look);
}

}  // namespace torchcache
