/* A row's weights from its scores of a chunk, and the merging of its chunks. */
#ifndef PROMPTMILL_ATTENTION_SOFTMAX_H
#define PROMPTMILL_ATTENTION_SOFTMAX_H

#include "attention_rows.h"

/* The elements [first, last) of them; `other` in place of others. */
INLINE lanes seen_or(float other, lanes x, int first, int last) {
  static const int32_t PLACES[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  if (first <= 0 && last >= LANES) return x;
  const ints nothing = (ints)(other - (vec){0});
  EACH_VEC {
    ints places, is_seen;
    memcpy(&places, PLACES + i * WIDTH, sizeof places);
    is_seen = (ints)(places >= first) & (ints)(places < last);
    x.v[i] = (vec)(((ints)x.v[i] & is_seen) | (nothing & ~is_seen));
  }
  return x;
}
INLINE lanes seen(lanes x, int first, int last) { return seen_or(-INFINITY, x, first, last); }

/* Cap a row's scores of a chunk if they are to be, and find their maximum. With a soft cap they come as powers of e.
 * This and what follows is kept out of line: one copy of the code, one rounding. */
__attribute__((noinline)) static float cap(float *scores, int first, int last, float softcap) {
  int begin = first / LANES * LANES, end = lanes_of(last) * LANES;
  lanes most = splat(-INFINITY);
  for (int j = begin; softcap > 0 && j < end; j += LANES) {
    lanes x = load_f32(scores + j);
    EACH_VEC x.v[i] = vec_tanh(x.v[i] / softcap) * (softcap * LOG2_E);
    store(scores + j, x);
  }
  for (int j = begin; j < end; j += LANES) {
    lanes x = seen(load_f32(scores + j), first - j, last - j);
    EACH_VEC most.v[i] = vec_max(x.v[i], most.v[i]);
  }
  return max_of_lanes(most);
}

/* Turn a row's scores of a chunk into weights, 2^(score - maximum), for BF16_PAIRS in bfloat16; returns their maximum and
 * sum. */
__attribute__((noinline)) static void weigh(float *scores, int first, int last, float softcap, int format, float *maximum,
                                            float *total) {
  int begin = first / LANES * LANES, end = lanes_of(last) * LANES;
  lanes sum = splat(0);
  *maximum = cap(scores, first, last, softcap);
  for (int j = begin; j < end; j += LANES) {
    lanes x = seen(load_f32(scores + j), first - j, last - j);
    EACH_VEC {
      x.v[i] = vec_exp2(x.v[i] - *maximum);
      sum.v[i] += x.v[i];
    }
    store_part(scores, j, end, x, format == BF16_PAIRS);
  }
  *total = sum_of_lanes(sum);
}

/* The largest scale of values [first, last), whose scales lie `offset` bytes into their panels. */
__attribute__((noinline)) static float largest_scale(const char *const *values, int64_t offset, int first, int last) {
  lanes most = splat(0);
  for (int j = first / LANES * LANES; j < last; j += LANES) {
    lanes x = seen_or(0, load_f32((const float *)(values[j / LANES] + offset)), first - j, last - j);
    EACH_VEC most.v[i] = vec_max(x.v[i], most.v[i]);
  }
  return max_of_lanes(most);
}

/* `weigh` for I8: weights in 16 bits, times their values' scales, of which `largest` is the largest; zeros for what the row
 * does not see of the panels of keys [all_first, all_last). */
__attribute__((noinline)) static void weigh_codes(float *scores, const char *const *values, int64_t offset, float largest,
                                                  int first, int last, int all_first, int all_last, float softcap,
                                                  float *maximum, float *total) {
  int begin = first / LANES * LANES, end = lanes_of(last) * LANES;
  int16_t *weights = (int16_t *)scores;
  float inverse = largest > 0 ? LARGEST_WEIGHT / largest : 0;
  lanes sum = splat(0);
  *maximum = cap(scores, first, last, softcap);
  for (int j = begin; j < end; j += LANES) {
    lanes x = seen(load_f32(scores + j), first - j, last - j);
    lanes scales = seen_or(0, load_f32((const float *)(values[j / LANES] + offset)), first - j, last - j);
    ints codes[NUM_VECS];
    EACH_VEC {
      x.v[i] = vec_exp2(x.v[i] - *maximum);
      sum.v[i] += x.v[i];
      codes[i] = nearest(x.v[i] * (scales.v[i] * inverse));
    }
    store_shorts(weights + j, codes);
  }
  *total = sum_of_lanes(sum);
  for (int j = all_first / LANES * LANES; j < begin; j++) weights[j] = 0;
  for (int j = end; j < lanes_of(all_last) * LANES; j++) weights[j] = 0;
}

/* A row's weighted values as numbers, of sums of codes. */
INLINE void scale_values(float *part, int dim_lanes, float scale) {
  for (int d = 0; d < dim_lanes * LANES; d += WIDTH) {
    ints sums;
    memcpy(&sums, part + d, sizeof sums);
    *(loose_vec *)(part + d) = __builtin_convertvector(sums, vec) * scale;
  }
}

/* Fold a chunk into what the row has so far. */
__attribute__((noinline)) static void merge(float *sum, const float *part, int dim_lanes, float *maximum, float *total,
                                            float chunk_maximum, float chunk_total) {
  float merged = chunk_maximum > *maximum ? chunk_maximum : *maximum;
  float old_factor = exp2_one(*maximum - merged), new_factor = exp2_one(chunk_maximum - merged);
  *total = *total * old_factor + chunk_total * new_factor;
  *maximum = merged;
  for (int d = 0; d < dim_lanes; d++) {
    lanes old = load_f32(sum + d * LANES), new = load_f32(part + d * LANES);
    EACH_VEC old.v[i] = old.v[i] * old_factor + new.v[i] * new_factor;
    store(sum + d * LANES, old);
  }
}

#endif
