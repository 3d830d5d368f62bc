/* A row in 8 bits, as a product takes it: with low and high the least and greatest of it and 0, it is
 * (code - zero) * (high - low) / 255, code within [0, 255].
 *
 * Every CPU and every build rounds alike: no addition here could be fused with a multiplication.
 */
#ifndef PROMPTMILL_QUANTISE_H
#define PROMPTMILL_QUANTISE_H

#include "dot_int8.h"

#define LEAST_RANGE 1e-30f /* a row with less between its ends is taken for zeros */

typedef struct {
  uint8_t *codes; /* [num_rows, depth_of(size)], missing ones as zeros; or NULL */
  float *scales;  /* [num_rows] */
  int32_t *zeros; /* [num_rows] */
} quantised;

INLINE int depth_of(int size) { return (size + DEPTH - 1) / DEPTH * DEPTH; }

/* How far a row reaches below and above 0; nan or infinite where one of its numbers is. */
typedef struct {
  float below, above;
} reach;

INLINE reach reach_of_floats(const float *x, int size) {
  lanes below = splat(0), above = splat(0), none = splat(0);
  for (int i = 0; i < size; i += LANES) {
    lanes value = load_part(x, i, size, F32);
    EACH_VEC {
      below.v[i] = vec_max(below.v[i], -value.v[i]);
      above.v[i] = vec_max(above.v[i], value.v[i]);
      none.v[i] += value.v[i] - value.v[i];
    }
  }
  return (reach){max_of_lanes(below), max_of_lanes(above) + sum_of_lanes(none)};
}

/* The greater of each two numbers of 16 bits. */
INLINE shorts shorts_max(shorts a, shorts b) {
#if defined(__AVX512BW__)
  return (shorts)_mm512_max_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__) && !defined(__AVX512F__)
  return (shorts)_mm256_max_epi16((__m256i)a, (__m256i)b);
#else
  shorts greater = (shorts)(a > b);
  return (a & greater) | (b & ~greater);
#endif
}

/* The same of unsigned ones. */
INLINE shorts unsigned_max(shorts a, shorts b) {
#if defined(__AVX512BW__)
  return (shorts)_mm512_max_epu16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__) && !defined(__AVX512F__)
  return (shorts)_mm256_max_epu16((__m256i)a, (__m256i)b);
#else
  const shorts sign = (shorts)((words){0} + 0x80008000u);
  return shorts_max(a ^ sign, b ^ sign) ^ sign;
#endif
}

/* The largest of integers below 2^24. */
INLINE int largest_of_ints(ints x) {
  lanes all = splat(-0x1p24f);
  all.v[0] = __builtin_convertvector(x, vec);
  return (int)max_of_lanes(all);
}

/* Of numbers of bfloat16, whose bits are in order: as signed integers those above 0, as unsigned ones, behind these, those
 * below. Infinities come behind all numbers, and nan behind them. */
INLINE reach reach_of_bf16(const uint16_t *x, int size) {
  enum { COUNT = 2 * WIDTH };
  shorts above = {0}, below = {0}, part;
  int i = 0;
  for (; i + COUNT <= size; i += COUNT) {
    memcpy(&part, x + i, sizeof part);
    above = shorts_max(above, part), below = unsigned_max(below, part);
  }
  if (i < size) {
    part = (shorts){0};
    memcpy(&part, x + i, (size_t)(size - i) * sizeof *x);
    above = shorts_max(above, part), below = unsigned_max(below, part);
  }
  int bits_above = at_least(largest_of_ints((ints)above >> 16), largest_of_ints((ints)((words)above << 16) >> 16));
  int bits_below = at_least(largest_of_ints((ints)((words)below >> 16)), largest_of_ints((ints)((words)below & 0xFFFF)));
  return (reach){from_bf16(at_least(bits_below, 0x8000) & 0x7FFF), from_bf16(bits_above)};
}

INLINE void quantise_row(const quantised *q, int row, const void *x, int size, int is_bf16) {
  int depth = depth_of(size);
  uint8_t *codes = q->codes + (int64_t)row * depth;
  reach r = is_bf16 ? reach_of_bf16(x, size) : reach_of_floats(x, size);
  float range = r.above + r.below;
  int has_numbers = r.above < INFINITY && r.below < INFINITY;
  if (!has_numbers || range < LEAST_RANGE) { /* no number at all, and then the product's row is none either; or zeros */
    memset(codes, 0, depth);
    q->zeros[row] = 0;
    q->scales[row] = has_numbers ? 0.0f : NAN;
    return;
  }
  float inverse = 255.0f / range;
  int32_t zero = nearest(r.below * inverse - (vec){0})[0];
  q->zeros[row] = zero - CODE_OFFSET;
  q->scales[row] = range / 255.0f;
  for (int first = 0; first < depth; first += LANES) {
    uint8_t values[LANES];
    int is_whole = first + LANES <= size;
    lanes value = is_whole ? load(at(x, first, is_bf16), 0, is_bf16) : load_part(x, first, size, is_bf16);
    int_lanes code;
    EACH_VEC code.v[i] = nearest(value.v[i] * inverse) + zero;
    store_codes(is_whole ? codes + first : values, &code);
    if (!is_whole) memcpy(codes + first, values, depth - first < LANES ? DEPTH : LANES);
  }
}

#endif
