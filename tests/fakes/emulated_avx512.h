/* Stands in for AVX512 where the CPU has AVX2: the same results in halves. To be included before a kernel's source.
 *
 * Vectors of 512 bits in plain C the compiler halves itself; these are the instructions that kernels name.
 * -DEMULATED_VNNI: AVX512-VNNI, too; else sums of 8-bit products are those of AVX512BW. -DEMULATED_BF16: AVX512-BF16,
 * with multiply-adds that round after each.
 */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "emulated_vnni.h"

typedef struct {
  __m256i low, high;
} both;

static inline both halves_of(const void *vector) {
  both parts;
  memcpy(&parts, vector, 64);
  return parts;
}

/* One AVX2 instruction with both halves of two vectors. */
#define IN_HALVES(NAME, TYPE, DO)                          \
  static inline TYPE NAME(TYPE a, TYPE b) {                \
    both x = halves_of(&a), y = halves_of(&b), result;     \
    result.low = DO(x.low, y.low);                         \
    result.high = DO(x.high, y.high);                      \
    memcpy(&a, &result, 64);                               \
    return a;                                              \
  }

static inline __m256i larger_of(__m256i a, __m256i b) {
  return _mm256_castps_si256(_mm256_max_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b)));
}

IN_HALVES(emulated_max_ps, __m512, larger_of)
IN_HALVES(emulated_max_epi32, __m512i, _mm256_max_epi32)
IN_HALVES(emulated_max_epi16, __m512i, _mm256_max_epi16)
IN_HALVES(emulated_max_epu16, __m512i, _mm256_max_epu16)
IN_HALVES(emulated_add_epi16, __m512i, _mm256_add_epi16)
IN_HALVES(emulated_maddubs_epi16, __m512i, _mm256_maddubs_epi16)
IN_HALVES(emulated_madd_epi16, __m512i, _mm256_madd_epi16)

/* One AVX2 instruction that widens each half of a vector of 16-bit numbers. */
#define WIDENED(NAME, TYPE, HALF, DO)                                                                       \
  static inline TYPE NAME(__m256i shorts) {                                                                 \
    TYPE result;                                                                                            \
    HALF parts[2] = {DO(_mm256_castsi256_si128(shorts)), DO(_mm256_extracti128_si256(shorts, 1))};          \
    memcpy(&result, parts, 64);                                                                             \
    return result;                                                                                          \
  }

WIDENED(emulated_cvtph_ps, __m512, __m256, _mm256_cvtph_ps)
WIDENED(emulated_cvtepu16_epi32, __m512i, __m256i, _mm256_cvtepu16_epi32)
WIDENED(emulated_cvtepi8_epi16, __m512i, __m256i, _mm256_cvtepi8_epi16)

static inline __m512i emulated_cvtps_epi32(__m512 a) {
  both x = halves_of(&a);
  x.low = _mm256_cvtps_epi32(_mm256_castsi256_ps(x.low));
  x.high = _mm256_cvtps_epi32(_mm256_castsi256_ps(x.high));
  __m512i result;
  memcpy(&result, &x, 64);
  return result;
}

static inline __m512i emulated_slli_epi32(__m512i a, int count) {
  both x = halves_of(&a);
  x.low = _mm256_slli_epi32(x.low, count);
  x.high = _mm256_slli_epi32(x.high, count);
  memcpy(&a, &x, 64);
  return a;
}

static inline __m512i emulated_loadu_si512(const void *p) {
  __m512i result;
  memcpy(&result, p, 64);
  return result;
}

static inline __m512i emulated_set1_epi32(int32_t x) {
  __m256i parts[2] = {_mm256_set1_epi32(x), _mm256_set1_epi32(x)};
  return emulated_loadu_si512(parts);
}

static inline __m512i emulated_set1_epi16(int16_t x) {
  __m256i parts[2] = {_mm256_set1_epi16(x), _mm256_set1_epi16(x)};
  return emulated_loadu_si512(parts);
}

static inline __m128i emulated_cvtusepi32_epi8(__m512i a) {
  uint32_t x[16];
  uint8_t bytes[16];
  memcpy(x, &a, 64);
  for (int i = 0; i < 16; i++) bytes[i] = x[i] > 255 ? 255 : x[i];
  return _mm_loadu_si128((const __m128i *)bytes);
}

static __attribute__((noinline)) __m512i emulated_dpbusd_epi32(__m512i sum, __m512i unsigned_bytes, __m512i signed_bytes) {
  both result = halves_of(&sum), x = halves_of(&unsigned_bytes), y = halves_of(&signed_bytes);
  result.low = emulated_dpbusd(result.low, x.low, y.low);
  result.high = emulated_dpbusd(result.high, x.high, y.high);
  return emulated_loadu_si512(&result);
}

static __attribute__((noinline)) __m512i emulated_dpwssd_epi32(__m512i sum, __m512i a, __m512i b) {
  __m512i products = emulated_madd_epi16(a, b);
  both result = halves_of(&sum), x = halves_of(&products);
  result.low = _mm256_add_epi32(result.low, x.low);
  result.high = _mm256_add_epi32(result.high, x.high);
  memcpy(&sum, &result, 64);
  return sum;
}

typedef int16_t emulated_bh __attribute__((vector_size(64)));

static inline __m512 emulated_dpbf16_ps(__m512 sum, emulated_bh a, emulated_bh b) {
  uint32_t x[16], y[16];
  float sums[16];
  memcpy(sums, &sum, 64);
  memcpy(x, &a, 64);
  memcpy(y, &b, 64);
  for (int i = 0; i < 16; i++)
    for (int is_high = 1; is_high >= 0; is_high--) {
      uint32_t bits[2] = {x[i] << 16 * !is_high & 0xFFFF0000u, y[i] << 16 * !is_high & 0xFFFF0000u};
      float factors[2];
      memcpy(factors, bits, 8);
      sums[i] += factors[0] * factors[1];
    }
  memcpy(&sum, sums, 64);
  return sum;
}

static inline __m512 emulated_setzero_ps(void) { return (__m512){0}; }

/* To the nearest, ties to even; what is below 2^-126 becomes a zero. */
static inline __m256i emulated_cvtneps_pbh(__m512 a) {
  uint32_t x[16];
  uint16_t shorts[16];
  memcpy(x, &a, 64);
  for (int i = 0; i < 16; i++) {
    uint32_t size = x[i] & 0x7FFFFFFF;
    if (size > 0x7F800000)
      shorts[i] = x[i] >> 16 | 0x40; /* a quiet nan */
    else
      shorts[i] = size < 0x00800000 ? x[i] >> 16 & 0x8000 : (x[i] + 0x7FFF + (x[i] >> 16 & 1)) >> 16;
  }
  return _mm256_loadu_si256((const __m256i *)shorts);
}

static inline __m512i emulated_cvtne2ps_pbh(__m512 high, __m512 low) {
  __m256i parts[2] = {emulated_cvtneps_pbh(low), emulated_cvtneps_pbh(high)};
  return emulated_loadu_si512(parts);
}

static inline __m256i emulated_extracti64x4_epi64(__m512i a, int is_high) {
  both x = halves_of(&a);
  return is_high ? x.high : x.low;
}

static inline __m256i emulated_castsi512_si256(__m512i a) { return halves_of(&a).low; }

static inline __m512i emulated_castsi256_si512(__m256i low) {
  __m256i parts[2] = {low, _mm256_setzero_si256()};
  return emulated_loadu_si512(parts);
}

static inline __m512i emulated_permutex2var_epi16(__m512i a, __m512i order, __m512i b) {
  uint16_t from[64], places[32], result[32];
  memcpy(from, &a, 64);
  memcpy(from + 32, &b, 64);
  memcpy(places, &order, 64);
  for (int i = 0; i < 32; i++) result[i] = from[places[i] & 63];
  return emulated_loadu_si512(result);
}

static inline void emulated_storeu_si512(void *p, __m512i a) { memcpy(p, &a, 64); }

#define _mm512_max_ps emulated_max_ps
#define _mm512_max_epi32 emulated_max_epi32
#define _mm512_max_epi16 emulated_max_epi16
#define _mm512_max_epu16 emulated_max_epu16
#define _mm512_add_epi16 emulated_add_epi16
#define _mm512_maddubs_epi16 emulated_maddubs_epi16
#define _mm512_madd_epi16 emulated_madd_epi16
#define _mm512_cvtph_ps emulated_cvtph_ps
#define _mm512_cvtepu16_epi32 emulated_cvtepu16_epi32
#define _mm512_slli_epi32 emulated_slli_epi32
#define _mm512_loadu_si512 emulated_loadu_si512
#define _mm512_set1_epi32 emulated_set1_epi32
#define _mm512_set1_epi16 emulated_set1_epi16
#define _mm512_cvtusepi32_epi8 emulated_cvtusepi32_epi8
#define _mm512_dpbusd_epi32 emulated_dpbusd_epi32
#define _mm512_dpwssd_epi32 emulated_dpwssd_epi32
#define _mm512_cvtepi8_epi16 emulated_cvtepi8_epi16
#define _mm512_cvtps_epi32 emulated_cvtps_epi32

#define __AVX512F__ 1
#define __AVX512BW__ 1
#ifdef EMULATED_VNNI
#define __AVX512VNNI__ 1
#endif
#ifdef EMULATED_BF16
#define __AVX512BF16__ 1
#define __m512bh emulated_bh
#define _mm512_dpbf16_ps emulated_dpbf16_ps
#define _mm512_setzero_ps emulated_setzero_ps
#define _mm512_cvtneps_pbh emulated_cvtneps_pbh
#define _mm512_cvtne2ps_pbh emulated_cvtne2ps_pbh
#define _mm512_extracti64x4_epi64 emulated_extracti64x4_epi64
#define _mm512_castsi512_si256 emulated_castsi512_si256
#define _mm512_storeu_si512 emulated_storeu_si512
#define _mm512_castsi256_si512 emulated_castsi256_si512
#define _mm512_permutex2var_epi16 emulated_permutex2var_epi16
#endif
