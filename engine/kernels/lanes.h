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
#endif

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
#define EACH_VEC for (int i = 0; i < NUM_VECS; i++)

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#endif
#endif
#ifndef SHUFFLE
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ints){__VA_ARGS__})
#endif

typedef float vec __attribute__((vector_size(4 * WIDTH)));
typedef int32_t ints __attribute__((vector_size(4 * WIDTH)));
typedef uint32_t words __attribute__((vector_size(4 * WIDTH)));
typedef uint16_t halves __attribute__((vector_size(2 * WIDTH)));
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

INLINE lanes load_f32(const float *p) {
  lanes r;
  EACH_VEC r.v[i] = *(const loose_vec *)(p + i * WIDTH);
  return r;
}

INLINE lanes load_bf16(const uint16_t *p) {
  lanes r;
  EACH_VEC r.v[i] = (vec)(__builtin_convertvector((halves) * (const loose_halves *)(p + i * WIDTH), words) << 16);
  return r;
}

/* The i-th sixteen elements of a row. */
INLINE lanes load(const void *row, int i, int is_bf16) {
  return is_bf16 ? load_bf16((const uint16_t *)row + i * LANES) : load_f32((const float *)row + i * LANES);
}

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

/* The last steps of the tree for several sums at once. Before: each sum's partial sums lie side by side in a and in b,
 * `n` for each; after: n / 2 for each, those of a first. */
#if WIDTH == 16
#define PAIR_16(a, b) \
  (SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) + \
   SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
#define PAIR_8(a, b) \
  (SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) + \
   SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31))
#define PAIR_4(a, b) \
  (SHUFFLE(a, b, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) + \
   SHUFFLE(a, b, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31))
#define PAIR_2(a, b) \
  (SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) + \
   SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31))
#elif WIDTH == 8
#define PAIR_8(a, b) (SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15))
#define PAIR_4(a, b) (SHUFFLE(a, b, 0, 1, 4, 5, 8, 9, 12, 13) + SHUFFLE(a, b, 2, 3, 6, 7, 10, 11, 14, 15))
#define PAIR_2(a, b) (SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14) + SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15))
#else
#define PAIR_4(a, b) (SHUFFLE(a, b, 0, 1, 4, 5) + SHUFFLE(a, b, 2, 3, 6, 7))
#define PAIR_2(a, b) (SHUFFLE(a, b, 0, 2, 4, 6) + SHUFFLE(a, b, 1, 3, 5, 7))
#endif

/* How many sums `sum_lanes` takes at once. */
#define NUM_SUMS (WIDTH / 2)

/* The sums over lanes of NUM_SUMS values, in its first NUM_SUMS elements. */
INLINE vec sum_lanes(const lanes *x) {
  vec s[NUM_SUMS];
#if WIDTH == 16
  for (int i = 0; i < 4; i++) s[i] = PAIR_16(x[2 * i].v[0], x[2 * i + 1].v[0]);
  for (int i = 0; i < 2; i++) s[i] = PAIR_8(s[2 * i], s[2 * i + 1]);
  s[0] = PAIR_4(s[0], s[1]);
#elif WIDTH == 8
  for (int i = 0; i < 4; i++) s[i] = x[i].v[0] + x[i].v[1];
  for (int i = 0; i < 2; i++) s[i] = PAIR_8(s[2 * i], s[2 * i + 1]);
  s[0] = PAIR_4(s[0], s[1]);
#else
  for (int i = 0; i < 2; i++) s[i] = (x[i].v[0] + x[i].v[2]) + (x[i].v[1] + x[i].v[3]);
  s[0] = PAIR_4(s[0], s[1]);
#endif
  return PAIR_2(s[0], s[0]);
}

INLINE float sum_of_lanes(lanes x) {
  lanes all[NUM_SUMS];
  for (int i = 0; i < NUM_SUMS; i++) all[i] = x;
  return sum_lanes(all)[0];
}

INLINE float max_of_lanes(lanes x) {
  float all[LANES], most;
  store(all, x);
  most = all[0];
  for (int i = 1; i < LANES; i++) most = all[i] > most ? all[i] : most;
  return most;
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

INLINE uint16_t to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (x != x) return 0x7FC0;
  return (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

INLINE float from_bf16(uint16_t x) {
  uint32_t bits = (uint32_t)x << 16;
  float r;
  memcpy(&r, &bits, 4);
  return r;
}

/* Element i of a row, and what follows it. */
INLINE const void *at(const void *row, int64_t i, int is_bf16) { return (const char *)row + i * (is_bf16 ? 2 : 4); }

INLINE float get(const void *row, int64_t i, int is_bf16) {
  return is_bf16 ? from_bf16(((const uint16_t *)row)[i]) : ((const float *)row)[i];
}

INLINE void put(void *row, int64_t i, float x, int is_bf16) {
  if (is_bf16)
    ((uint16_t *)row)[i] = to_bf16(x);
  else
    ((float *)row)[i] = x;
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
  if (!is_bf16 && i + LANES <= size) {
    store((float *)row + i, x);
    return;
  }
  store(values, x);
  if (i + LANES <= size)
    for (int l = 0; l < LANES; l++) put(row, i + l, values[l], is_bf16);
  else
    for (int l = i; l < size; l++) put(row, l, values[l - i], is_bf16);
}

/* As a number of the row's format. */
INLINE lanes rounded(lanes x, int is_bf16) {
  float values[LANES];
  if (!is_bf16) return x;
  store(values, x);
  for (int l = 0; l < LANES; l++) values[l] = from_bf16(to_bf16(values[l]));
  return load_f32(values);
}

#endif
