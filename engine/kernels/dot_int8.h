/* Exact sums of products of 8-bit numbers, on whatever dot products the CPU has: the same integers on all of them.
 *
 * A row's numbers are unsigned, a weight's signed. AVX2, AVX512BW and 64-bit Arm's base add products in 16 bits, four
 * of them here, which would saturate; so the packing of a weight keeps the sum of the positive ones of each four, and
 * that of the negative ones, within MAX_FOUR.
 */
#ifndef PROMPTMILL_DOT_INT8_H
#define PROMPTMILL_DOT_INT8_H

#include "lanes.h"

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

#define DEPTH 8      /* elements of a row that one `dot` takes */
#define MAX_FOUR 128 /* 255 * 128 is the most that 16 bits hold; of codes stored 128 lower it is as much on either side */
/* Lanes of 16 bits sum elements {0, 1, 4, 5} and {2, 3, 6, 7} of each eight. */
#define FOUR_OF(k) ((k) / 2 % 2)

typedef struct {
  ints v[NUM_VECS];
} int_lanes;

/* What a row's codes are stored lower, to be signed bytes for a CPU that multiplies signed by signed. */
#if defined(__aarch64__)
#define CODE_OFFSET 128
#else
#define CODE_OFFSET 0
#endif

/* A row's codes, kept within [0, 255] and stored CODE_OFFSET lower. */
INLINE void store_codes(uint8_t *p, const int_lanes *codes) {
#if defined(__AVX512F__)
  __m512i at_least_0 = _mm512_max_epi32((__m512i)codes->v[0], (__m512i)(ints){0});
  _mm_storeu_si128((__m128i *)p, _mm512_cvtusepi32_epi8(at_least_0));
#elif defined(__AVX2__)
  __m256i shorts = _mm256_packs_epi32((__m256i)codes->v[0], (__m256i)codes->v[1]); /* in halves of each */
  shorts = _mm256_permute4x64_epi64(shorts, 0xD8);
  __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(shorts), _mm256_extracti128_si256(shorts, 1));
  _mm_storeu_si128((__m128i *)p, bytes);
#elif defined(__aarch64__)
  int16x8_t low = vcombine_s16(vqmovn_s32((int32x4_t)codes->v[0]), vqmovn_s32((int32x4_t)codes->v[1]));
  int16x8_t high = vcombine_s16(vqmovn_s32((int32x4_t)codes->v[2]), vqmovn_s32((int32x4_t)codes->v[3]));
  uint8x16_t bytes = vcombine_u8(vqmovun_s16(low), vqmovun_s16(high));
  vst1q_u8(p, veorq_u8(bytes, vdupq_n_u8(CODE_OFFSET)));
#else
  typedef uint8_t bytes __attribute__((vector_size(WIDTH)));
  EACH_VEC {
    ints code = codes->v[i], is_above = code > 255;
    code &= ~(code < 0);
    code = (code & ~is_above) | (255 & is_above);
    bytes part = __builtin_convertvector(code - CODE_OFFSET, bytes);
    memcpy(p + i * WIDTH, &part, sizeof part);
  }
#endif
}

/* acc[column] += sum of codes[k] * weight[k][column] over DEPTH k, for LANES columns.
 * weight: [2, LANES, 4]: k is 4 * first + last index. */
INLINE void dot(int_lanes *acc, const uint8_t *codes, const int8_t *weight) {
  int32_t low, high;
  memcpy(&low, codes, 4);
  memcpy(&high, codes + 4, 4);
#if defined(__AVX512F__) && defined(__AVX512VNNI__)
  __m512i sum = _mm512_dpbusd_epi32((__m512i)acc->v[0], _mm512_set1_epi32(low), _mm512_loadu_si512(weight));
  acc->v[0] = (ints)_mm512_dpbusd_epi32(sum, _mm512_set1_epi32(high), _mm512_loadu_si512(weight + 64));
#elif defined(__AVX512BW__)
  __m512i four = _mm512_add_epi16(_mm512_maddubs_epi16(_mm512_set1_epi32(low), _mm512_loadu_si512(weight)),
                                  _mm512_maddubs_epi16(_mm512_set1_epi32(high), _mm512_loadu_si512(weight + 64)));
  acc->v[0] += (ints)_mm512_madd_epi16(four, _mm512_set1_epi16(1));
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
  EACH_VEC {
    const __m256i *w = (const __m256i *)weight + i;
    __m256i sum = _mm256_dpbusd_avx_epi32((__m256i)acc->v[i], _mm256_set1_epi32(low), _mm256_loadu_si256(w));
    acc->v[i] = (ints)_mm256_dpbusd_avx_epi32(sum, _mm256_set1_epi32(high), _mm256_loadu_si256(w + 2));
  }
#elif defined(__AVX2__) && !defined(__AVX512F__)
  EACH_VEC {
    const __m256i *w = (const __m256i *)weight + i;
    __m256i four = _mm256_add_epi16(_mm256_maddubs_epi16(_mm256_set1_epi32(low), _mm256_loadu_si256(w)),
                                    _mm256_maddubs_epi16(_mm256_set1_epi32(high), _mm256_loadu_si256(w + 2)));
    acc->v[i] += (ints)_mm256_madd_epi16(four, _mm256_set1_epi16(1));
  }
#elif defined(__ARM_FEATURE_DOTPROD)
  EACH_VEC {
    int32x4_t sum = vdotq_s32((int32x4_t)acc->v[i], vreinterpretq_s8_s32(vdupq_n_s32(low)), vld1q_s8(weight + 16 * i));
    acc->v[i] = (ints)vdotq_s32(sum, vreinterpretq_s8_s32(vdupq_n_s32(high)), vld1q_s8(weight + 64 + 16 * i));
  }
#elif defined(__aarch64__)
  int8x16_t first = vreinterpretq_s8_s32(vdupq_n_s32(low)), last = vreinterpretq_s8_s32(vdupq_n_s32(high));
  EACH_VEC {
    int8x16_t w = vld1q_s8(weight + 16 * i), x = vld1q_s8(weight + 64 + 16 * i);
    int16x8_t two = vmlal_s8(vmull_s8(vget_low_s8(first), vget_low_s8(w)), vget_low_s8(last), vget_low_s8(x));
    int16x8_t next = vmlal_high_s8(vmull_high_s8(first, w), last, x);
    acc->v[i] = (ints)vpadalq_s16((int32x4_t)acc->v[i], vpaddq_s16(two, next));
  }
#else
  for (int column = 0; column < LANES; column++)
    for (int k = 0; k < DEPTH; k++)
      acc->v[column / WIDTH][column % WIDTH] += codes[k] * weight[k / 4 * 64 + column * 4 + k % 4];
#endif
}

#endif
