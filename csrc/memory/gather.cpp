#include "memory/gather.h"

namespace torchcache::memory {
namespace {

DeviceGather& registered() {
  static DeviceGather gather = nullptr;
  return gather;
}

}  // namespace

DeviceGather device_gather() { return registered(); }

void register_device_gather(DeviceGather gather) { registered() = gather; }

}  // namespace torchcache::memory
