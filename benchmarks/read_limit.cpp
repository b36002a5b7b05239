// How fast this machine reads memory: the sum of all words, with AVX2 and the prefetch distance of the hash.
#include <immintrin.h>

#include <cstddef>
#include <cstdint>

extern "C" uint64_t read_all(const uint8_t* data, size_t size) {
  __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
  for (size_t i = 0; i + 128 <= size; i += 128) {
    _mm_prefetch(reinterpret_cast<const char*>(data + i + 512), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(data + i + 576), _MM_HINT_T0);
    const auto* p = reinterpret_cast<const __m256i*>(data + i);
    a = _mm256_add_epi64(a, _mm256_loadu_si256(p));
    b = _mm256_add_epi64(b, _mm256_loadu_si256(p + 1));
    c = _mm256_add_epi64(c, _mm256_loadu_si256(p + 2));
    d = _mm256_add_epi64(d, _mm256_loadu_si256(p + 3));
  }
  a = _mm256_add_epi64(_mm256_add_epi64(a, b), _mm256_add_epi64(c, d));
  return _mm256_extract_epi64(a, 0) + _mm256_extract_epi64(a, 1) + _mm256_extract_epi64(a, 2) +
         _mm256_extract_epi64(a, 3);
}
