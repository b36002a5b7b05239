#include "hash/device.h"

namespace torchcache::hash {
namespace {

const DeviceHasher*& registered() {
  static const DeviceHasher* hasher = nullptr;
  return hasher;
}

}  // namespace

const DeviceHasher* device_hasher() { return registered(); }

void register_device_hasher(const DeviceHasher* hasher) { registered() = hasher; }

}  // namespace torchcache::hash
