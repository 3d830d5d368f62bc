/* The arithmetic of rows of paged attention: scores and weighted values; attention_softmax.h has what lies between.
 *
 * Each operation of a row is done in one order whatever tile it is part of; see attention.c for what a row is. Knows
 * nothing of sequences or tasks: keys and values are panels that somebody has found.
 *
 * A panel is LANES keys or values. Of keys it has one dimension after the other, so that a lane is a key: a score is one
 * chain of multiply-adds over the dimensions, with no sum over lanes, and rows share each key that is loaded. Of values
 * it has one after the other, so that a lane is a dimension.
 */
#ifndef PROMPTMILL_ATTENTION_ROWS_H
#define PROMPTMILL_ATTENTION_ROWS_H

#include "lanes.h"

#define CHUNK 256 /* keys; the arithmetic's own, see torch_backend.CHUNK_SIZE */
#define STRIDE (CHUNK + LANES) /* of rows of scores: a power of two would crowd a few sets of the L1 cache */
#define NUM_PANELS (CHUNK / LANES)
#define LOG2_E 1.44269504088896341f
/* A tile is MAX_ROWS rows by WIDE lanes. With 16 registers (AVX2) that, or half as many rows by twice the lanes, is 12
 * accumulators, beside two vectors of keys or values and one of a query or weight, or the other way round; a multiply-add
 * takes four cycles, of two a cycle. With 32 registers it is 24 accumulators. */
#define MAX_ROWS 6
#if WIDTH == 16
#define WIDE_OF(rows) 4
#define MAX_WIDE 4
#else
#define WIDE_OF(rows) ((rows) > MAX_ROWS / 2 ? 1 : 2)
#define MAX_WIDE 2
#endif
#define BLOCK_PANELS (2 * MAX_WIDE) /* panels that stay in L1 while all rows pass over them */

/* Beside the formats of elements: keys and values in bfloat16 that are multiplied with queries and weights in bfloat16. */
#define BF16_PAIRS 4
#if defined(__AVX512BF16__)
#define HAS_PAIRS 1
#else
#define HAS_PAIRS 0
#endif

INLINE int lanes_of(int count) { return parts_of(count, LANES); }

#define WRITE_PART 1  /* the step's keys and values into the pages */
#define ATTEND_PART 2 /* its queries over the pages */

typedef struct {
  const void *q, *k, *v;            /* [num_tokens, heads, head_dim], elements of head_dim side by side */
  void *out;                        /* [num_tokens, num_heads, head_dim], contiguous */
  const void *step;                 /* what lies between `query_start` and `keys` here, at the time of the call */
  const float *sinks;               /* [num_heads], or NULL */
  int64_t q_strides[2], k_strides[2], v_strides[2]; /* of token and head, in elements */
  int32_t layer, num_heads, num_kv_heads, head_dim;
  int32_t sliding_window;           /* 0: none */
  int32_t num_threads;
  float scaling, softcap;           /* softcap 0: none */
  int32_t format;                   /* of q, k, v, out */
  int32_t parts;                    /* WRITE_PART, ATTEND_PART */

  const int32_t *query_start;       /* [num_seqs + 1] */
  const int32_t *context_lens;      /* [num_seqs] */
  const int32_t *block_tables;      /* [num_seqs, table_stride] */
  const int64_t *slot_mapping;      /* [num_tokens] */
  char *cache;                      /* of all layers */
  int64_t layer_bytes, keys_bytes;  /* of a layer, and of its keys, behind which its values lie */
  int64_t table_stride;
  int32_t num_seqs, num_tokens, block_size;
  int32_t kv_format;                /* of keys and values */

  char *keys, *values;              /* of the layer, as attention_pages.h has them; these two are set here */
} attention_args;

/* One thread's memory for one task; rows are ordered by kv head, token, head of the group. */
typedef struct {
  float *q;                         /* [groups of rows, head_dim, MAX_ROWS]; a group is of one kv head */
  const uint16_t **queries;         /* [rows], where each lies, for BF16_PAIRS and I8 */
  float scaling;                    /* of the products with these */
  float *query_scale, *weight_scale; /* [rows], of what is rounded for I8 */
  float *scores, *part, *sum;       /* [rows, CHUNK], [rows, padded_dim] twice */
  float *maximum, *total;           /* [rows], so far */
  float *chunk_maximum, *chunk_total; /* [rows], of the chunk at hand */
  int32_t *position;                /* [rows] */
  int32_t *first, *last;            /* [rows], the keys of the chunk at hand that it sees; none if first >= last */
  float *packed_keys;               /* [kv heads, NUM_PANELS, padded_dim, LANES] */
  float *packed_values;             /* [kv heads, CHUNK, padded_dim] */
  const char *keys[NUM_PANELS], *values[NUM_PANELS]; /* the chunk's panels, of kv head 0 */
  const char **pieces;              /* [num_pieces] what a decode reads: of this chunk and of the next, in order of memory */
  int num_pieces, num_next;         /* the chunk's own; the next one's */
  int num_asked;                    /* so many have been asked for when the chunk is begun */
  int64_t head_bytes;               /* from one kv head's panel to the next's */
  int64_t key_step;                 /* elements from a dimension of a panel of keys to the next */
} scratch;

/* Do it with a constant number of rows. */
#define WITH_ROWS(count, DO) \
  switch (count) { \
    case 1: DO(1); break; \
    case 2: DO(2); break; \
    case 3: DO(3); break; \
    case 4: DO(4); break; \
    case 5: DO(5); break; \
    default: DO(6); \
  }

/* Ask for a line of keys or values that are read soon: into L2, which waits for more lines of memory at a time than L1. A
 * decode from memory takes 0.65 to 0.8 of the time that it takes into L1 (AMD Zen 4, one and two cores). */
INLINE void fetch_ahead(const char *line) { __builtin_prefetch(line, 0, 2); }

/* acc[row] += factors[row] * elements, where these are LANES each of `wide` rows of keys or values, `place` bytes into them.
 * What is held in registers meanwhile is the shorter of both. */
INLINE void add_products(vec acc[MAX_ROWS][MAX_WIDE * NUM_VECS], const float *factors, int64_t stride,
                         const char *const *elements, int64_t place, int num_rows, int wide, int format) {
  vec held[MAX_WIDE * NUM_VECS];
  if (num_rows > MAX_ROWS / 2) {
    UNROLL(8)
    for (int i = 0; i < wide * NUM_VECS; i++)
      held[i] = load_vec(elements[i / NUM_VECS] + place, i % NUM_VECS, format);
    UNROLL(6)
    for (int r = 0; r < num_rows; r++) {
      vec factor = factors[r * stride] - (vec){0};
      UNROLL(8)
      for (int i = 0; i < wide * NUM_VECS; i++) acc[r][i] += factor * held[i];
    }
  } else {
    UNROLL(3)
    for (int r = 0; r < num_rows; r++) held[r] = factors[r * stride] - (vec){0};
    UNROLL(8)
    for (int i = 0; i < wide * NUM_VECS; i++) {
      vec element = load_vec(elements[i / NUM_VECS] + place, i % NUM_VECS, format);
      UNROLL(3)
      for (int r = 0; r < num_rows; r++) acc[r][i] += held[r] * element;
    }
  }
}

#if HAS_PAIRS
#include "attention_bf16.h"
#endif
#include "attention_int8.h"

/* Scores of `num_rows` rows, whose queries are `q`, with `wide` panels of keys from `panel` on, dimension by dimension; asks
 * for what lies `ahead`. */
INLINE void score_tile(const scratch *s, const float *q, int row, int panel, const char *const *ahead, int64_t offset,
                       int head_dim, int num_rows, int wide, int format) {
  float *scores = s->scores + (int64_t)row * STRIDE + panel * LANES;
  const char *const *keys = s->keys + panel;
  int64_t step = s->key_step * size_of(format);
#if HAS_PAIRS
  if (format == BF16_PAIRS) {
    score_pairs(s->queries + row, s->scaling, keys, ahead, offset, step, head_dim, scores, num_rows, wide);
    return;
  }
#endif
  if (format == I8) {
    const int16_t *queries = (const int16_t *)s->q + (int64_t)row * head_dim;
    score_codes(queries, s->query_scale + row, keys, ahead, offset, head_dim, scores, num_rows, wide);
    return;
  }
  vec acc[MAX_ROWS][MAX_WIDE * NUM_VECS];
  const char *elements[MAX_WIDE];
  for (int p = 0; p < wide; p++) elements[p] = keys[p] + offset;
  for (int r = 0; r < num_rows; r++)
    for (int i = 0; i < wide * NUM_VECS; i++) acc[r][i] = (vec){0};
  int64_t place = 0;
#pragma GCC unroll 1
  for (int p = 0; p < wide; p++) {
    const char *line = ahead ? ahead[p] : NULL;
    for (int64_t end = place + head_dim / wide * step; place < end; place += step, q += MAX_ROWS) {
      for (int i = 0; ahead && i < wide * LANES * size_of(format); i += LINE, line += LINE) fetch_ahead(line);
      add_products(acc, q, 1, elements, place, num_rows, wide, format);
    }
  }
  for (; place < head_dim * step; place += step, q += MAX_ROWS)
    add_products(acc, q, 1, elements, place, num_rows, wide, format);
  for (int r = 0; r < num_rows; r++)
    for (int i = 0; i < wide * NUM_VECS; i++) *(loose_vec *)(scores + (int64_t)r * STRIDE + i * WIDTH) = acc[r][i];
}

/* Scores of a kv head's rows, whose queries are `q`, with the BLOCK_PANELS panels from `panel` on. */
INLINE void score_block(const scratch *s, const float *q, int row, int num_rows, int head_dim, int64_t offset, int panel,
                        const char *const *ahead, int format) {
  for (int end = row + num_rows; row < end; row += MAX_ROWS, q += head_dim * MAX_ROWS, ahead = NULL) {
    /* The later a row, the later are the keys that it sees. */
    int first = s->first[row], last = s->last[at_most(row + MAX_ROWS, end) - 1];
#define SCORE_TILE(ROWS, COUNT) \
  score_tile(s, q, row, p, ahead ? ahead + p - panel : NULL, offset, head_dim, ROWS, COUNT, format)
#define SCORE(ROWS) \
  for (int p = panel; p < panel + BLOCK_PANELS; p += WIDE_OF(ROWS)) \
    if (first < (p + WIDE_OF(ROWS)) * LANES && p * LANES < last) { \
      if (WIDE_OF(ROWS) > 1 && last <= (p + WIDE_OF(ROWS) / 2) * LANES) \
        SCORE_TILE(ROWS, WIDE_OF(ROWS) > 1 ? WIDE_OF(ROWS) / 2 : 1); \
      else \
        SCORE_TILE(ROWS, WIDE_OF(ROWS)); \
    }
    WITH_ROWS(end - row, SCORE)
#undef SCORE
#undef SCORE_TILE
  }
}

/* part[row] += weight * value for keys [first, last), `wide` times LANES dimensions of `num_rows` rows, keys in order. */
INLINE void value_tile(float *part, int64_t part_stride, const float *weights, const char *const *values,
                       const char *const *ahead, int64_t offset, int first, int last, int dim, int num_rows, int wide,
                       int format) {
#if HAS_PAIRS
  if (format == BF16_PAIRS) {
    value_pairs(part, part_stride, weights, values, ahead, offset, first, last, dim, num_rows, wide);
    return;
  }
#endif
  if (format == I8) {
    value_codes((int32_t *)part, part_stride, weights, values, ahead, offset, first, last, dim, num_rows, wide);
    return;
  }
  int64_t step = part_stride * size_of(format), start = (int64_t)dim * LANES * size_of(format);
  vec acc[MAX_ROWS][MAX_WIDE * NUM_VECS];
  const char *elements[MAX_WIDE];
  part += dim * LANES;
  for (int r = 0; r < num_rows; r++)
    for (int i = 0; i < wide * NUM_VECS; i++) acc[r][i] = load_vec(part + r * part_stride, i, F32);
  for (int j = first; j < last;) {
    int panel = j / LANES, end = at_most(last, (panel + 1) * LANES);
    const char *next = ahead ? ahead[panel % BLOCK_PANELS] + start : NULL;
    for (int p = 0; p < wide; p++) elements[p] = values[panel] + offset + start + p * LANES * size_of(format);
#pragma GCC unroll 2
    for (int64_t place = j % LANES * step; j < end; j++, place += step) {
      for (int line = 0; ahead && line < wide * LANES * size_of(format); line += LINE)
        fetch_ahead(next + place + line);
      add_products(acc, weights + j, STRIDE, elements, place, num_rows, wide, format);
    }
  }
  for (int r = 0; r < num_rows; r++)
    for (int i = 0; i < wide * NUM_VECS; i++) *(loose_vec *)(part + r * part_stride + i * WIDTH) = acc[r][i];
}

INLINE void add_values(const scratch *s, int row, int num_rows, int dim_lanes, int64_t offset, int first, int last,
                       const char *const *ahead, int format) {
  int64_t stride = (int64_t)dim_lanes * LANES;
  float *part = s->part + row * stride;
  const float *weights = s->scores + (int64_t)row * STRIDE;
  int dim = 0;
  if (first >= last) return;
#define ADD(ROWS, COUNT) \
  value_tile(part, stride, weights, s->values, ahead, offset, first, last, dim, ROWS, COUNT, format)
#define ADD_ALL(ROWS) \
  for (; dim + WIDE_OF(ROWS) <= dim_lanes; dim += WIDE_OF(ROWS)) ADD(ROWS, WIDE_OF(ROWS)); \
  for (; dim < dim_lanes; dim++) ADD(ROWS, 1)
  WITH_ROWS(num_rows, ADD_ALL)
#undef ADD_ALL
#undef ADD
}

/* Weighted values of a kv head's rows, of the keys [first, last): a row takes only what it sees, in order. */
INLINE void value_block(const scratch *s, int row, int num_rows, int dim_lanes, int64_t offset, int first, int last,
                        const char *const *ahead, int format) {
  for (int end = row + num_rows; row < end; row += MAX_ROWS, ahead = NULL) {
    int count = at_most(MAX_ROWS, end - row);
    /* The later a row, the later are the keys that it sees. */
    if (format == I8) { /* what a row does not see has no weight */
      add_values(s, row, count, dim_lanes, offset, at_least(first, s->first[row]),
                 at_most(last, s->last[row + count - 1]), ahead, format);
      continue;
    }
    int common_first = at_least(first, s->first[row + count - 1]), common_last = at_most(last, s->last[row]);
    if (format == BF16_PAIRS) common_first = (common_first + 1) & ~1, common_last &= ~1;
    int is_common = common_first < common_last;
    for (int r = row; r < row + count; r++)
      add_values(s, r, 1, dim_lanes, offset, at_least(first, s->first[r]),
                 at_most(is_common ? common_first : last, s->last[r]), NULL, format);
    if (!is_common) continue;
    add_values(s, row, count, dim_lanes, offset, common_first, common_last, ahead, format);
    for (int r = row; r < row + count; r++)
      add_values(s, r, 1, dim_lanes, offset, common_last, at_most(last, s->last[r]), NULL, format);
  }
}

#endif
