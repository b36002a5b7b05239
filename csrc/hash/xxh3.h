// The long-input form of XXH3-128 (seed 0, default secret), the one hash function of torchcache: one definition for
// host and device code. Source: the XXH3 specification of the xxHash project; the PyPI package `xxhash` is the oracle
// of its tests.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "core/device_code.h"

namespace torchcache::hash::xxh3 {

constexpr size_t kStripe = 64;           // bytes that the eight lanes read at once
constexpr size_t kSecretSize = 192;      // bytes
constexpr size_t kStripesPerBlock = 16;  // (kSecretSize - kStripe) / 8: then the lanes are scrambled
constexpr size_t kBlock = kStripe * kStripesPerBlock;
constexpr size_t kShortest = 256;  // bytes; shorter input is padded with zeros up to here

constexpr uint64_t kPrime32_1 = 0x9E3779B1, kPrime32_2 = 0x85EBCA77, kPrime32_3 = 0xC2B2AE3D;
constexpr uint64_t kPrime64_1 = 0x9E3779B185EBCA87, kPrime64_2 = 0xC2B2AE3D27D4EB4F;
constexpr uint64_t kPrime64_3 = 0x165667B19E3779F9, kPrime64_4 = 0x85EBCA77C2B2AE63;
constexpr uint64_t kPrime64_5 = 0x27D4EB2F165667C5, kPrimeMix = 0x165667919E3779F9;

// The default secret, as bytes.
#define TORCHCACHE_XXH3_SECRET                                                                                      \
  0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c, 0xde, 0xd4, 0x6d, \
      0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f, 0xcb, 0x79, 0xe6, 0x4e, 0xcc,   \
      0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21, 0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24,   \
      0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c, 0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88,   \
      0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3, 0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef,   \
      0x46, 0xa9, 0xde, 0xac, 0xd8, 0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7,   \
      0x0b, 0x4f, 0x1d, 0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73,   \
      0x64, 0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb, 0x17,   \
      0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e, 0x2b, 0x16, 0xbe,   \
      0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce, 0x45, 0xcb, 0x3a, 0x8f, 0x95,   \
      0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e

// Little-endian; every host that the library starts on is (csrc/hash/digest.cpp).
TORCHCACHE_HD uint64_t read64(const uint8_t* p) {
  uint64_t v;
  memcpy(&v, p, 8);
  return v;
}

// 8 bytes of the secret from any byte on, as a number.
TORCHCACHE_HD constexpr uint64_t secret64(size_t at) {
  constexpr uint8_t secret[kSecretSize] = {TORCHCACHE_XXH3_SECRET};
  uint64_t v = 0;
  for (size_t i = 0; i < 8; ++i) v |= static_cast<uint64_t>(secret[at + i]) << (8 * i);
  return v;
}

// What lane i xors to its data: in stripe j of a block, at the scramble, in the last stripe, and in the two merges.
constexpr size_t stripe_secret(size_t j, size_t i) { return 8 * (j + i); }
constexpr size_t scramble_secret(size_t i) { return kSecretSize - kStripe + 8 * i; }
constexpr size_t last_secret(size_t i) { return kSecretSize - kStripe - 7 + 8 * i; }
constexpr size_t kMergeLow = 11, kMergeHigh = kSecretSize - kStripe - 11;

TORCHCACHE_HD void start(uint64_t lanes[8]) {
  lanes[0] = kPrime32_3, lanes[1] = kPrime64_1, lanes[2] = kPrime64_2, lanes[3] = kPrime64_3;
  lanes[4] = kPrime64_4, lanes[5] = kPrime32_2, lanes[6] = kPrime64_5, lanes[7] = kPrime32_1;
}

// One lane's product in one stripe; the lane's data itself goes to the neighbour lane i ^ 1.
TORCHCACHE_HD uint64_t product(uint64_t data, uint64_t secret) {
  const uint64_t keyed = data ^ secret;
  return (keyed & 0xFFFFFFFF) * (keyed >> 32);
}

TORCHCACHE_HD uint64_t scramble(uint64_t lane, uint64_t secret) { return (lane ^ (lane >> 47) ^ secret) * kPrime32_1; }

TORCHCACHE_HD uint64_t fold(uint64_t a, uint64_t b) {
#if defined(__CUDA_ARCH__)
  return (a * b) ^ __umul64hi(a, b);
#else
  const auto wide = static_cast<unsigned __int128>(a) * b;
  return static_cast<uint64_t>(wide) ^ static_cast<uint64_t>(wide >> 64);
#endif
}

TORCHCACHE_HD uint64_t merge(const uint64_t lanes[8], const uint64_t secret[8], uint64_t seed) {
  uint64_t h = seed;
  for (int i = 0; i < 8; i += 2) h += fold(lanes[i] ^ secret[i], lanes[i + 1] ^ secret[i + 1]);
  h ^= h >> 37;
  h *= kPrimeMix;
  return h ^ (h >> 32);
}

// The two halves of the digest, from the lanes after the last stripe and the length in bytes.
TORCHCACHE_HD uint64_t finish_low(const uint64_t lanes[8], uint64_t size) {
  constexpr uint64_t secret[8] = {secret64(kMergeLow),      secret64(kMergeLow + 8),  secret64(kMergeLow + 16),
                                  secret64(kMergeLow + 24), secret64(kMergeLow + 32), secret64(kMergeLow + 40),
                                  secret64(kMergeLow + 48), secret64(kMergeLow + 56)};
  return merge(lanes, secret, size * kPrime64_1);
}

TORCHCACHE_HD uint64_t finish_high(const uint64_t lanes[8], uint64_t size) {
  constexpr uint64_t secret[8] = {secret64(kMergeHigh),      secret64(kMergeHigh + 8),  secret64(kMergeHigh + 16),
                                  secret64(kMergeHigh + 24), secret64(kMergeHigh + 32), secret64(kMergeHigh + 40),
                                  secret64(kMergeHigh + 48), secret64(kMergeHigh + 56)};
  return merge(lanes, secret, ~(size * kPrime64_2));
}

}  // namespace torchcache::hash::xxh3
