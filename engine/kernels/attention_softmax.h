/* A row's weights from its scores of a chunk, and the merging of its chunks. */
#ifndef PROMPTMILL_ATTENTION_SOFTMAX_H
#define PROMPTMILL_ATTENTION_SOFTMAX_H

#include "attention_rows.h"

/* The elements [first, last) of them; minus infinity in place of others. */
INLINE lanes seen(lanes x, int first, int last) {
  static const int32_t PLACES[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  if (first <= 0 && last >= LANES) return x;
  const ints nothing = (ints)(-INFINITY - (vec){0});
  EACH_VEC {
    ints places, is_seen;
    memcpy(&places, PLACES + i * WIDTH, sizeof places);
    is_seen = (ints)(places >= first) & (ints)(places < last);
    x.v[i] = (vec)(((ints)x.v[i] & is_seen) | (nothing & ~is_seen));
  }
  return x;
}

/* Turn a row's scores of a chunk into weights, 2^(score - maximum), for BF16_PAIRS in bfloat16; returns their maximum and
 * sum. With a soft cap the scores come as powers of e. Kept out of line: one copy of the code, one rounding. */
__attribute__((noinline)) static void weigh(float *scores, int first, int last, float softcap, int format, float *maximum,
                                            float *total) {
  int begin = first / LANES * LANES, end = (last + LANES - 1) / LANES * LANES;
  lanes most = splat(-INFINITY), sum = splat(0);
  for (int j = begin; softcap > 0 && j < end; j += LANES) {
    lanes x = load_f32(scores + j);
    EACH_VEC x.v[i] = vec_tanh(x.v[i] / softcap) * (softcap * LOG2_E);
    store(scores + j, x);
  }
  for (int j = begin; j < end; j += LANES) {
    lanes x = seen(load_f32(scores + j), first - j, last - j);
    EACH_VEC most.v[i] = vec_max(x.v[i], most.v[i]);
  }
  *maximum = max_of_lanes(most);
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
