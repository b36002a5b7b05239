// H on the CPU: XXH3's long-input loop in portable C++ and in AVX2, chosen when the library is loaded.
#include "hash/digest.h"

#include <cstring>

#include "hash/xxh3.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define TORCHCACHE_AVX2 __attribute__((target("avx2")))
#endif

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "torchcache needs a little-endian machine: keys and files are defined in little-endian order"
#endif

namespace torchcache::hash {
namespace {

using namespace xxh3;

struct Portable {
  uint64_t lanes[8];

  Portable() { start(lanes); }

  template <class SecretAt>
  void stripe(const uint8_t* p, SecretAt secret_at) {
    for (size_t i = 0; i < 8; ++i) {
      const uint64_t data = read64(p + 8 * i);
      lanes[i ^ 1] += data;
      lanes[i] += product(data, read64(secret_at(i)));
    }
  }

  void scramble_all(const uint8_t* secret) {
    for (size_t i = 0; i < 8; ++i) lanes[i] = scramble(lanes[i], read64(secret + scramble_secret(i)));
  }
};

alignas(64) constexpr uint8_t kSecret[kSecretSize] = {TORCHCACHE_XXH3_SECRET};

Digest finish(const uint64_t lanes[8], uint64_t size) { return {finish_low(lanes, size), finish_high(lanes, size)}; }

// size ≥ kShortest.
Digest long_portable(const uint8_t* p, size_t size) noexcept {
  Portable state;
  const size_t blocks = (size - 1) / kBlock;
  for (size_t b = 0; b < blocks; ++b, p += kBlock) {
    for (size_t j = 0; j < kStripesPerBlock; ++j)
      state.stripe(p + j * kStripe, [j](size_t i) { return kSecret + stripe_secret(j, i); });
    state.scramble_all(kSecret);
  }
  const size_t rest = size - blocks * kBlock;
  for (size_t j = 0; j < (rest - 1) / kStripe; ++j)
    state.stripe(p + j * kStripe, [j](size_t i) { return kSecret + stripe_secret(j, i); });
  state.stripe(p + rest - kStripe, [](size_t i) { return kSecret + last_secret(i); });
  return finish(state.lanes, size);
}

#if defined(__x86_64__)

constexpr size_t kPrefetch = 512;  // bytes ahead: measured best of 256 … 2048

TORCHCACHE_AVX2 inline __m256i load(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

TORCHCACHE_AVX2 inline __m256i stripe_half(__m256i lanes, const uint8_t* p, const uint8_t* secret) {
  const __m256i data = load(p);
  const __m256i keyed = _mm256_xor_si256(data, load(secret));
  const __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
  const __m256i swapped = _mm256_shuffle_epi32(data, _MM_SHUFFLE(1, 0, 3, 2));
  return _mm256_add_epi64(lanes, _mm256_add_epi64(product, swapped));
}

TORCHCACHE_AVX2 inline __m256i scramble_half(__m256i lanes, const uint8_t* secret) {
  const __m256i prime = _mm256_set1_epi64x(static_cast<int64_t>(kPrime32_1));
  const __m256i mixed = _mm256_xor_si256(_mm256_xor_si256(lanes, _mm256_srli_epi64(lanes, 47)), load(secret));
  const __m256i low = _mm256_mul_epu32(mixed, prime);
  const __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(mixed, 32), prime);
  return _mm256_add_epi64(low, _mm256_slli_epi64(high, 32));
}

TORCHCACHE_AVX2 Digest long_avx2(const uint8_t* p, size_t size) noexcept {
  alignas(32) uint64_t lanes[8];
  start(lanes);
  __m256i a = _mm256_load_si256(reinterpret_cast<const __m256i*>(lanes));
  __m256i b = _mm256_load_si256(reinterpret_cast<const __m256i*>(lanes + 4));
  const size_t blocks = (size - 1) / kBlock;
  for (size_t k = 0; k < blocks; ++k, p += kBlock) {
    for (size_t j = 0; j < kStripesPerBlock; ++j) {
      _mm_prefetch(reinterpret_cast<const char*>(p + j * kStripe + kPrefetch), _MM_HINT_T0);
      a = stripe_half(a, p + j * kStripe, kSecret + 8 * j);
      b = stripe_half(b, p + j * kStripe + 32, kSecret + 8 * j + 32);
    }
    a = scramble_half(a, kSecret + scramble_secret(0));
    b = scramble_half(b, kSecret + scramble_secret(4));
  }
  const size_t rest = size - blocks * kBlock;
  for (size_t j = 0; j < (rest - 1) / kStripe; ++j) {
    _mm_prefetch(reinterpret_cast<const char*>(p + j * kStripe + kPrefetch), _MM_HINT_T0);
    a = stripe_half(a, p + j * kStripe, kSecret + 8 * j);
    b = stripe_half(b, p + j * kStripe + 32, kSecret + 8 * j + 32);
  }
  a = stripe_half(a, p + rest - kStripe, kSecret + last_secret(0));
  b = stripe_half(b, p + rest - 32, kSecret + last_secret(4));
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), a);
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes + 4), b);
  return finish(lanes, size);
}

#endif

using LongForm = Digest (*)(const uint8_t*, size_t) noexcept;

LongForm fastest() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2")) return long_avx2;
#endif
  return long_portable;
}

Digest padded(const void* data, size_t size, LongForm long_form) noexcept {
  if (size >= kShortest) return long_form(static_cast<const uint8_t*>(data), size);
  uint8_t bytes[kShortest] = {};
  if (size > 0) memcpy(bytes, data, size);
  return long_form(bytes, kShortest);
}

const LongForm kFastest = fastest();

}  // namespace

Digest digest(const void* data, size_t size) noexcept { return padded(data, size, kFastest); }

Digest digest_portable(const void* data, size_t size) noexcept { return padded(data, size, long_portable); }

void to_canonical(Digest d, uint8_t out[16]) noexcept {
  const uint64_t high = __builtin_bswap64(d.high), low = __builtin_bswap64(d.low);
  memcpy(out, &high, 8);
  memcpy(out + 8, &low, 8);
}

Digest from_canonical(const uint8_t in[16]) noexcept {
  return {__builtin_bswap64(xxh3::read64(in + 8)), __builtin_bswap64(xxh3::read64(in))};
}

}  // namespace torchcache::hash
