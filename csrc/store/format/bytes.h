// Little-endian numbers in unaligned bytes.
#pragma once

#include <cstdint>
#include <cstring>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "torchcache needs a little-endian machine: its files are defined in little-endian order"
#endif

namespace torchcache::store {

template <class T>
T load(const uint8_t* in) {
  T value;
  memcpy(&value, in, sizeof value);
  return value;
}

template <class T>
void save(uint8_t* out, T value) {
  memcpy(out, &value, sizeof value);
}

}  // namespace torchcache::store
