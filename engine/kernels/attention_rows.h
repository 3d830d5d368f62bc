/* The arithmetic of rows of paged attention: scores, weights, weighted values, merging of chunks.
 *
 * Each operation of a row is done in one order whatever tile it is part of; see attention.c for what a row is. Knows
 * nothing of sequences or tasks: keys and values are rows that somebody has found.
 */
#ifndef PROMPTMILL_ATTENTION_ROWS_H
#define PROMPTMILL_ATTENTION_ROWS_H

#include "lanes.h"

#define CHUNK 256     /* keys; the arithmetic's own, see torch_backend.CHUNK_SIZE */
#define KEY_BLOCK 32  /* keys that stay in L1 while all rows pass over them */
#if WIDTH == 16
#define SCORE_ROWS 3 /* rows times NUM_SUMS accumulators, of 32 vector registers */
#define VALUE_ROWS 3
#define VALUE_LANES 4
#elif WIDTH == 8
#define SCORE_ROWS 1
#define VALUE_ROWS 2 /* 8 accumulators of 16 registers; with 12 one lies in memory, and every key waits for it */
#define VALUE_LANES 2
#else
#define SCORE_ROWS 3
#define VALUE_ROWS 3
#define VALUE_LANES 2
#endif
#define MAX_ROWS_AT_ONCE 3

typedef struct {
  const void *q, *k, *v;            /* [num_tokens, heads, head_dim], elements of head_dim side by side */
  void *out;                        /* [num_tokens, num_heads, head_dim], contiguous */
  void *keys, *values;              /* [num_blocks * block_size, num_kv_heads, head_dim], contiguous */
  const int32_t *query_start;       /* [num_seqs + 1] */
  const int32_t *context_lens;      /* [num_seqs] */
  const int32_t *block_tables;      /* [num_seqs, table_stride] */
  const int64_t *slot_mapping;      /* [num_tokens] */
  const float *sinks;               /* [num_heads], or NULL */
  int64_t q_strides[2], k_strides[2], v_strides[2]; /* of token and head, in elements */
  int64_t table_stride;
  int32_t num_seqs, num_tokens, num_heads, num_kv_heads, head_dim, block_size;
  int32_t sliding_window;           /* 0: none */
  int32_t num_threads;
  float scaling, softcap;           /* softcap 0: none */
} attention_args;

/* One thread's memory for one task; rows are ordered by kv head, token, head of the group. */
typedef struct {
  float *q, *scores, *part, *sum; /* [rows, padded_dim], [rows, CHUNK], [rows, padded_dim] twice */
  float *maximum, *total;         /* [rows] */
  int32_t *position;              /* [rows] */
  float *packed_keys, *packed_values;         /* [kv heads, CHUNK, padded_dim] */
  const char *key_rows[CHUNK], *value_rows[CHUNK]; /* of kv head 0 */
  const char *key_ahead[CHUNK], *value_ahead[CHUNK]; /* what to fetch while a row is read */
  int64_t head_bytes; /* from one kv head's row to the next's */
  int looks_ahead;    /* a decode reads each key once, from memory; the rows of a prefill find them in the cache */
} scratch;

INLINE int at_least(int a, int b) { return a > b ? a : b; }
INLINE int at_most(int a, int b) { return a < b ? a : b; }

/* Ask for the lines of some lanes of a row, which may lie anywhere: a prefetch never faults. */
INLINE void fetch(const char *row, int num_lanes, int is_bf16) {
  int bytes = num_lanes * LANES * (is_bf16 ? 2 : 4);
  for (int line = 0; line < bytes; line += 64) __builtin_prefetch(row + line, 0, 3);
}

/* Scores of `num_rows` rows with NUM_SUMS keys. */
INLINE void score_tile(const float *q, int dim_lanes, const char *const *keys, int64_t offset, float *scores,
                       int num_rows, int is_bf16) {
  lanes acc[MAX_ROWS_AT_ONCE][NUM_SUMS];
  for (int r = 0; r < num_rows; r++)
    for (int j = 0; j < NUM_SUMS; j++) acc[r][j] = splat(0);
  for (int d = 0; d < dim_lanes; d++) {
    lanes query[MAX_ROWS_AT_ONCE];
#pragma GCC unroll 3
    for (int r = 0; r < num_rows; r++) query[r] = load_f32(q + (r * dim_lanes + d) * LANES);
#pragma GCC unroll 8
    for (int j = 0; j < NUM_SUMS; j++) {
      lanes key = load(keys[j] + offset, d, is_bf16);
#pragma GCC unroll 3
      for (int r = 0; r < num_rows; r++) acc[r][j] = mul_add(query[r], key, acc[r][j]);
    }
  }
  for (int r = 0; r < num_rows; r++) {
    vec sums = sum_lanes(acc[r]);
    memcpy(scores + (int64_t)r * CHUNK, &sums, NUM_SUMS * sizeof(float));
  }
}

/* Scores of rows with the keys [first, last) of a chunk; a few keys around them get some, too. */
INLINE void score_block(const scratch *s, int row, int num_rows, int dim_lanes, int64_t offset, int first, int last,
                        int is_bf16) {
  int is_first = 1;
  for (; num_rows > 0; row += SCORE_ROWS, num_rows -= SCORE_ROWS, is_first = 0) {
    const float *q = s->q + (int64_t)row * dim_lanes * LANES;
    for (int j = first; j < last; j += NUM_SUMS) {
      float *scores = s->scores + (int64_t)row * CHUNK + j;
      for (int i = j; is_first && s->looks_ahead && i < at_most(j + NUM_SUMS, last); i++)
        fetch(s->key_ahead[i] + offset, dim_lanes, is_bf16);
      if (SCORE_ROWS == 1 || num_rows == 1)
        score_tile(q, dim_lanes, s->key_rows + j, offset, scores, 1, is_bf16);
      else if (num_rows == 2)
        score_tile(q, dim_lanes, s->key_rows + j, offset, scores, 2, is_bf16);
      else
        score_tile(q, dim_lanes, s->key_rows + j, offset, scores, 3, is_bf16);
    }
  }
}

/* part[row] += weight * value for keys [first, last), `num_lanes` lanes of `num_rows` rows, keys in order. */
INLINE void value_tile(float *part, int64_t part_stride, const float *weights, const char *const *values,
                       const char *const *ahead, int64_t offset, int first, int last, int dim, int num_rows,
                       int num_lanes, int is_bf16) {
  lanes acc[MAX_ROWS_AT_ONCE][VALUE_LANES];
  for (int r = 0; r < num_rows; r++)
    for (int i = 0; i < num_lanes; i++) acc[r][i] = load_f32(part + r * part_stride + (dim + i) * LANES);
  for (int j = first; j < last; j++) {
    lanes value[VALUE_LANES];
    if (ahead) fetch(ahead[j] + offset + dim * LANES * (is_bf16 ? 2 : 4), num_lanes, is_bf16);
#pragma GCC unroll 4
    for (int i = 0; i < num_lanes; i++) value[i] = load(values[j] + offset, dim + i, is_bf16);
#pragma GCC unroll 3
    for (int r = 0; r < num_rows; r++) {
      lanes weight = splat(weights[(int64_t)r * CHUNK + j]);
#pragma GCC unroll 4
      for (int i = 0; i < num_lanes; i++) acc[r][i] = mul_add(weight, value[i], acc[r][i]);
    }
  }
  for (int r = 0; r < num_rows; r++)
    for (int i = 0; i < num_lanes; i++) store(part + r * part_stride + (dim + i) * LANES, acc[r][i]);
}

INLINE void add_values(const scratch *s, int row, int num_rows, int dim_lanes, int64_t offset, int first, int last,
                       int is_bf16) {
  int64_t stride = (int64_t)dim_lanes * LANES;
  float *part = s->part + row * stride;
  const float *weights = s->scores + (int64_t)row * CHUNK;
  const char *const *ahead = s->looks_ahead ? s->value_ahead : NULL;
  int dim = 0;
  if (first >= last) return;
#define ADD_VALUES(ROWS, COUNT) \
  value_tile(part, stride, weights, s->value_rows, ahead, offset, first, last, dim, ROWS, COUNT, is_bf16)
  for (; dim + VALUE_LANES <= dim_lanes; dim += VALUE_LANES) {
    if (num_rows == 3)
      ADD_VALUES(3, VALUE_LANES);
    else if (num_rows == 2)
      ADD_VALUES(2, VALUE_LANES);
    else
      ADD_VALUES(1, VALUE_LANES);
  }
  for (; dim < dim_lanes; dim++) {
    if (num_rows == 3)
      ADD_VALUES(3, 1);
    else if (num_rows == 2)
      ADD_VALUES(2, 1);
    else
      ADD_VALUES(1, 1);
  }
#undef ADD_VALUES
}

/* The keys of the chunk at `start` that the row sees: [first, last), empty if first >= last. */
INLINE void seen_keys(const attention_args *a, const scratch *s, int row, int start, int *first, int *last) {
  int position = s->position[row];
  *first = a->sliding_window > 0 ? at_least(0, position - a->sliding_window + 1 - start) : 0;
  *last = at_most(CHUNK, position + 1 - start);
}

/* Weighted values of the keys [first, last) of a chunk: a row takes only what it sees, in order. */
INLINE void value_block(const attention_args *a, const scratch *s, int row, int num_rows, int dim_lanes, int64_t offset,
                        int start, int first, int last, int is_bf16) {
  for (int end = row + num_rows; row < end; row += VALUE_ROWS) {
    int count = at_most(VALUE_ROWS, end - row), common_first = first, common_last = last;
    int row_first[VALUE_ROWS], row_last[VALUE_ROWS];
    for (int r = 0; r < count; r++) {
      seen_keys(a, s, row + r, start, &row_first[r], &row_last[r]);
      row_first[r] = at_least(row_first[r], first);
      row_last[r] = at_most(row_last[r], last);
      common_first = at_least(common_first, row_first[r]);
      common_last = at_most(common_last, row_last[r]);
    }
    if (common_first >= common_last) {
      for (int r = 0; r < count; r++) add_values(s, row + r, 1, dim_lanes, offset, row_first[r], row_last[r], is_bf16);
      continue;
    }
    for (int r = 0; r < count; r++) add_values(s, row + r, 1, dim_lanes, offset, row_first[r], common_first, is_bf16);
    add_values(s, row, count, dim_lanes, offset, common_first, common_last, is_bf16);
    for (int r = 0; r < count; r++) add_values(s, row + r, 1, dim_lanes, offset, common_last, row_last[r], is_bf16);
  }
}

/* Turn a row's scores of a chunk into weights; returns their maximum and sum. Kept out of line: one copy of the code,
 * one rounding. */
__attribute__((noinline)) static void weigh(float *scores, int first, int last, float scaling, float softcap,
                                            float *maximum, float *total) {
  int begin = first / LANES * LANES, end = (last + LANES - 1) / LANES * LANES;
  lanes most = splat(-INFINITY), sum = splat(0);
  for (int j = begin; j < first; j++) scores[j] = -INFINITY;
  for (int j = last; j < end; j++) scores[j] = -INFINITY;
  for (int j = begin; j < end; j += LANES) {
    lanes x = load_f32(scores + j);
    EACH_VEC {
      vec score = x.v[i] * scaling;
      if (softcap > 0) score = vec_tanh(score / softcap) * softcap;
      x.v[i] = score;
    }
    store(scores + j, x);
    for (int l = 0; softcap > 0 && l < LANES; l++)
      if (j + l < first || j + l >= last) scores[j + l] = -INFINITY;
    x = load_f32(scores + j);
    EACH_VEC most.v[i] = vec_max(x.v[i], most.v[i]);
  }
  *maximum = max_of_lanes(most);
  for (int j = begin; j < end; j += LANES) {
    lanes x = load_f32(scores + j);
    EACH_VEC {
      x.v[i] = vec_exp(x.v[i] - *maximum);
      sum.v[i] += x.v[i];
    }
    store(scores + j, x);
  }
  *total = sum_of_lanes(sum);
}

/* Fold a chunk into what the row has so far. */
__attribute__((noinline)) static void merge(float *sum, const float *part, int dim_lanes, float *maximum, float *total,
                                            float chunk_maximum, float chunk_total) {
  float merged = chunk_maximum > *maximum ? chunk_maximum : *maximum;
  float old_factor = exp_one(*maximum - merged), new_factor = exp_one(chunk_maximum - merged);
  *total = *total * old_factor + chunk_total * new_factor;
  *maximum = merged;
  for (int d = 0; d < dim_lanes; d++) {
    lanes old = load_f32(sum + d * LANES), new = load_f32(part + d * LANES);
    EACH_VEC old.v[i] = old.v[i] * old_factor + new.v[i] * new_factor;
    store(sum + d * LANES, old);
  }
}

#endif
