#include "hash/device.h"

namespace torchcache {
namespace {

const Device*& registered() {
  static const Device* device = nullptr;
  return device;
}

}  // namespace

const Device* cuda() { return registered(); }

void register_cuda(const Device* device) { registered() = device; }

}  // namespace torchcache
