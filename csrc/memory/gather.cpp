#include "memory/gather.h"

namespace torchcache {
namespace {

DeviceGather& registered() {
  static DeviceGather gather = nullptr;
  return gather;
}

}  // namespace

DeviceGather device_gather() { return registered(); }

void register_device_gather(DeviceGather gather) { registered() = gather; }

}  // namespace torchcache
