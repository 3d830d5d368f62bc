/* Sixteen floats at a time, on whatever vectors the CPU has, with one order of additions on all of them.
 *
 * A `lanes` value is one 512-bit vector, two of 256 bits or four of 128. Sums over lanes are the tree
 * (l + 8), (l + 4), (l + 2), (l + 1), whatever the width. Products are contracted into fused multiply-adds wherever
 * the CPU has them; within one build that is everywhere or nowhere.
 */
#ifndef PROMPTMILL_LANES_H
#define PROMPTMILL_LANES_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "half.h"

#define LANES 16
#if defined(__AVX512F__)
#define WIDTH 16
#elif defined(__AVX__)
#define WIDTH 8
#else
#define WIDTH 4
#endif
#define NUM_VECS (LANES / WIDTH)
#define INLINE static inline __attribute__((always_inline))
#define LINE 64 /* bytes of a line of the caches */
#define EACH_VEC for (int i = 0; i < NUM_VECS; i++)
/* Unroll the loop that follows, whose count, a constant of up to `most`, is known once it is inlined. Clang takes gcc's
 * pragma for exactly that many, and leaves accumulators in memory. */
#define PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define UNROLL(most) _Pragma("clang loop unroll(full)")
#else
#define UNROLL(most) PRAGMA(GCC unroll most)
#endif

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif
#ifndef SHUFFLE
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ints){__VA_ARGS__})
#endif

INLINE int at_most(int a, int b) { return a < b ? a : b; }
INLINE int at_least(int a, int b) { return a > b ? a : b; }
/* How many of `size` make `count`, the last perhaps smaller. */
INLINE int parts_of(int count, int size) { return (count + size - 1) / size; }

typedef float vec __attribute__((vector_size(4 * WIDTH)));
typedef int32_t ints __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t words __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t halves __attribute__((vector_size(2 * WIDTH)));
typedef int16_t shorts __attribute__((vector_size(4 * WIDTH)));
typedef float loose_vec __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef uint16_t loose_halves __attribute__((vector_size(2 * WIDTH), aligned(2), may_alias));
typedef struct {
  vec v[NUM_VECS];
} lanes;

INLINE lanes splat(float x) {
  lanes r;
  EACH_VEC r.v[i] = x - (vec){0};
  return r;
}

INLINE vec vec_f16(const uint16_t *p) {
#if defined(__AVX512F__)
  return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__F16C__)
  return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#elif defined(__aarch64__)
  return (vec)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
#else
  words bits = __builtin_convertvector((halves) * (const loose_halves *)p, words);
  words size = (bits & 0x7FFF) << 13, is_odd = (words)(size >= 0x0F800000u); /* infinity or nan */
  vec value = (vec)size * 0x1p112f;
  return (vec)((words)value | (is_odd & 0x7F800000u) | ((bits & 0x8000) << 16));
#endif
}

INLINE vec vec_bf16(const uint16_t *p) {
  /* What gcc 12 makes of the general conversion takes vectors apart and joins them again. */
#if defined(__aarch64__)
  return (vec)vzip1q_u16(vdupq_n_u16(0), vcombine_u16(vld1_u16(p), vdup_n_u16(0)));
#elif WIDTH == 16
  return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
#elif defined(__AVX2__)
  /* One shuffle puts an element above two zero bytes, where widening and shifting are two operations: 4 to 6% of a
   * product of 32 rows or more. */
  const char z = -128;
  const __m256i above = _mm256_setr_epi8(z, z, 0, 1, z, z, 2, 3, z, z, 4, 5, z, z, 6, 7, z, z, 8, 9, z, z, 10, 11, z, z, 12,
                                         13, z, z, 14, 15);
  return (vec)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)p)), above);
#else
  return (vec)(__builtin_convertvector((halves) * (const loose_halves *)p, words) << 16);
#endif
}

/* To bfloat16 as `to_bf16` rounds; the low half of each element is left as it comes. */
INLINE words bf16_above(vec x) {
  words bits = (words)x, is_nan = (words)(x != x);
  bits += ((bits >> 16) & 1) + 0x7FFF;
  return (bits & ~is_nan) | (0x7FC00000 & is_nan);
}

/* To bfloat16 and into memory. AVX512-BF16's instruction, everywhere where there is one, writes zeros for numbers below
 * 2^-126. */
INLINE void store_bf16(uint16_t *p, vec x) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
  *(loose_halves *)p = __builtin_convertvector(bf16_above(x) >> 16, halves);
#endif
}

/* The nearest number of bfloat16; the same numbers as `store_bf16`'s. */
INLINE vec vec_rounded(vec x) {
#if defined(__AVX512BF16__)
  return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x)), 16);
#else
  return (vec)(bf16_above(x) & 0xFFFF0000);
#endif
}

/* The i-th WIDTH elements of a row. */
INLINE vec load_vec(const void *row, int64_t i, int format) {
  if (format == F32) return *(const loose_vec *)((const float *)row + i * WIDTH);
  const uint16_t *p = (const uint16_t *)row + i * WIDTH;
  return format == F16 ? vec_f16(p) : vec_bf16(p);
}

/* The i-th sixteen elements of a row. */
INLINE lanes load(const void *row, int64_t i, int format) {
  lanes r;
  for (int v = 0; v < NUM_VECS; v++) r.v[v] = load_vec(row, i * NUM_VECS + v, format);
  return r;
}

INLINE lanes load_f32(const float *p) { return load(p, 0, F32); }

INLINE void store(float *p, lanes x) {
  EACH_VEC *(loose_vec *)(p + i * WIDTH) = x.v[i];
}

/* acc + a * b, fused where the CPU fuses. */
INLINE lanes mul_add(lanes a, lanes b, lanes acc) {
  EACH_VEC acc.v[i] += a.v[i] * b.v[i];
  return acc;
}

/* a where it is greater, else b. */
INLINE vec vec_max(vec a, vec b) {
#if WIDTH == 8
  return (vec)_mm256_max_ps((__m256)a, (__m256)b);
#elif WIDTH == 16
  return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
  ints greater = (ints)(a > b);
  return (vec)(((ints)a & greater) | ((ints)b & ~greater));
#endif
}

/* The elements turned by n places: element i is what stood at i + n. */
#if WIDTH == 16
#define TURNED(x, n) \
  SHUFFLE(x, x, n, (1 + n) % 16, (2 + n) % 16, (3 + n) % 16, (4 + n) % 16, (5 + n) % 16, (6 + n) % 16, (7 + n) % 16, \
          (8 + n) % 16, (9 + n) % 16, (10 + n) % 16, (11 + n) % 16, (12 + n) % 16, (13 + n) % 16, (14 + n) % 16, \
          (15 + n) % 16)
#elif WIDTH == 8
#define TURNED(x, n) \
  SHUFFLE(x, x, n, (1 + n) % 8, (2 + n) % 8, (3 + n) % 8, (4 + n) % 8, (5 + n) % 8, (6 + n) % 8, (7 + n) % 8)
#else
#define TURNED(x, n) SHUFFLE(x, x, n, (1 + n) % 4, (2 + n) % 4, (3 + n) % 4)
#endif

INLINE float sum_of_lanes(lanes x) {
#if WIDTH == 16
  vec s = x.v[0] + TURNED(x.v[0], 8);
  s += TURNED(s, 4);
#elif WIDTH == 8
  vec s = x.v[0] + x.v[1];
  s += TURNED(s, 4);
#else
  vec s = (x.v[0] + x.v[2]) + (x.v[1] + x.v[3]);
#endif
  s += TURNED(s, 2);
  return (s + TURNED(s, 1))[0];
}

/* The largest of them, none of which is nan. */
INLINE float max_of_lanes(lanes x) {
  vec s = x.v[0];
  for (int i = 1; i < NUM_VECS; i++) s = vec_max(s, x.v[i]);
#if WIDTH == 16
  s = vec_max(s, TURNED(s, 8));
#endif
#if WIDTH >= 8
  s = vec_max(s, TURNED(s, 4));
#endif
  s = vec_max(s, TURNED(s, 2));
  return vec_max(s, TURNED(s, 1))[0];
}

INLINE lanes divided(lanes x, float by) {
  EACH_VEC x.v[i] /= by;
  return x;
}

/* The nearest integer, ties to even, of numbers below 2^22. No addition, which might be fused with what made x. */
INLINE ints nearest(vec x) {
#if defined(__AVX512F__)
  return (ints)_mm512_cvtps_epi32((__m512)x);
#elif defined(__AVX__)
  return (ints)_mm256_cvtps_epi32((__m256)x);
#elif defined(__aarch64__)
  return (ints)vcvtnq_s32_f32((float32x4_t)x);
#else
  const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer in the low bits */
  return (ints)(x + magic) - (ints)(magic - (vec){0});
#endif
}

/* e^x within 2 ulp, after Cephes' expf (Moshier, 1989). Below -87.3 it is 0, -inf included; nan stays nan. For x up
 * to 88. */
INLINE vec vec_exp(vec x) {
  const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer in the low bits */
  ints in_range = (ints)(x > -87.3f), is_nan = (ints)(x != x);
  x = (vec)((ints)x & in_range);
  vec shifted = x * 1.44269504088896341f + magic;
  vec n = shifted - magic;
  vec r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  ints exponent = ((ints)shifted - (ints)(magic - (vec){0})) << 23;
  return (vec)((((ints)p + exponent) & in_range) | is_nan);
}

/* 2^x within 2 ulp for x up to 127; 2^0 is 1. Up to 2^-126 it is 0, -inf included; nan stays nan. The polynomial is the
 * best of degree 5 within half an octave, relative to 2^r, with p(0) = 1. */
INLINE vec vec_exp2(vec x) {
  const float magic = 12583039.0f; /* 1.5 * 2^23 + 127: adding it rounds to an integer, 127 too high, in the low bits */
  ints is_tiny = (ints)(x <= -126.0f);
  vec shifted = x + magic;
  vec r = x - (shifted - magic);
  vec p = r * 1.326472731307149e-3f + 9.671512991189957e-3f;
  p = p * r + 5.550733581185341e-2f;
  p = p * r + 2.4022242426872253e-1f;
  p = p * r + 6.931470036506653e-1f;
  p = p * r + 1.0f;
  p *= (vec)((ints)shifted << 23);
  return (vec)((ints)p & ~is_tiny);
}

/* tanh within 4 ulp, after Cephes' tanhf. */
INLINE vec vec_tanh(vec x) {
  const ints sign_bit = (ints)((words){0} + 0x80000000u);
  ints sign = (ints)x & sign_bit;
  vec size = (vec)((ints)x & ~sign_bit);
  vec e = vec_exp(size * -2.0f);
  vec large = (1.0f - e) / (1.0f + e);
  vec z = size * size;
  vec p = z * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  vec small = p * z * size + size;
  ints is_small = (ints)(size < 0.625f);
  return (vec)((((ints)small & is_small) | ((ints)large & ~is_small)) | sign);
}

/* e^x for one number, with the same bits. */
INLINE float exp_one(float x) { return vec_exp(x - (vec){0})[0]; }

/* 2^x likewise. */
INLINE float exp2_one(float x) { return vec_exp2(x - (vec){0})[0]; }

/* Element i of a row, and what follows it. */
INLINE const void *at(const void *row, int64_t i, int format) { return (const char *)row + i * size_of(format); }

INLINE float get(const void *row, int64_t i, int format) {
  if (format == F32) return ((const float *)row)[i];
  if (format == I8) return ((const int8_t *)row)[i];
  return format == BF16 ? from_bf16(((const uint16_t *)row)[i]) : from_f16(((const uint16_t *)row)[i]);
}

INLINE void put(void *row, int64_t i, float x, int format) {
  if (format == F32)
    ((float *)row)[i] = x;
  else
    ((uint16_t *)row)[i] = format == BF16 ? to_bf16(x) : to_f16(x);
}

/* The elements [i, i + LANES) of a row of `size`; zeros for those beyond. */
INLINE lanes load_part(const void *row, int i, int size, int is_bf16) {
  if (i + LANES <= size) return load(at(row, i, is_bf16), 0, is_bf16);
  float values[LANES] = {0};
  for (int l = i; l < size; l++) values[l - i] = get(row, l, is_bf16);
  return load_f32(values);
}

INLINE void store_part(void *row, int i, int size, lanes x, int is_bf16) {
  float values[LANES];
  if (i + LANES > size) {
    store(values, x);
    for (int l = i; l < size; l++) put(row, l, values[l - i], is_bf16);
  } else if (is_bf16) {
    uint16_t *p = (uint16_t *)row + i;
    EACH_VEC store_bf16(p + i * WIDTH, x.v[i]);
  } else {
    store((float *)row + i, x);
  }
}

/* As a number of the row's format. */
INLINE lanes rounded(lanes x, int is_bf16) {
  EACH_VEC if (is_bf16) x.v[i] = vec_rounded(x.v[i]);
  return x;
}

#endif
