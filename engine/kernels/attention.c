/* Attention over a paged KV cache on a CPU: prefill and decode in one function, with one arithmetic per row.
 *
 * The twin of engine/attention/torch_backend.py, which states the formula: keys in chunks of CHUNK counted from position
 * 0, chunks merged in order of position. A row (one query token, one head) is computed from its query and from the keys
 * and values it sees, each operation in a fixed order: q.k by lanes and then down their tree; the sum of a chunk's
 * exponentials by lanes and down the tree; the weighted values key by key. Tiles, tasks and threads choose only when an
 * operation happens, never which: a row's bits do not depend on them.
 *
 * A task is a tile of query tokens of one sequence, for one kv head or, for a decode, for a range of them, so that whole
 * pages are read front to back. Keys are taken in blocks of KEY_BLOCK that stay in the L1 cache for all rows of a task.
 */
#include <stdlib.h>

#include "lanes.h"

#define CHUNK 256     /* keys; the arithmetic's own, see torch_backend.CHUNK_SIZE */
#define KEY_BLOCK 32  /* keys that stay in L1 while all rows pass over them */
#define AHEAD 32      /* keys between what is read and what is fetched from memory meanwhile */
#define TILE_ROWS 64  /* query tokens times heads of their group: 64 rows of 64 floats fill a third of a 48 KiB L1 */
#define MIN_WORK (1 << 16) /* multiply-adds below which a second thread costs more than it brings */
#if WIDTH == 16
#define SCORE_ROWS 3 /* rows times NUM_SUMS accumulators, of 32 vector registers */
#define VALUE_LANES 4
#elif WIDTH == 8
#define SCORE_ROWS 1
#define VALUE_LANES 2
#else
#define SCORE_ROWS 3
#define VALUE_LANES 2
#endif
#define VALUE_ROWS 3
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

typedef struct {
  int32_t seq, first_token, last_token; /* tokens of the sequence's queries of this step */
  int32_t first_head, last_head;        /* kv heads */
} task;

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

/* Turn a row's scores of a chunk into weights; returns their maximum and sum. Kept out of line: one copy, one rounding. */
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

INLINE void copy_to_f32(float *to, const void *from, int count, int padded, int is_bf16) {
  if (is_bf16)
    for (int d = 0; d < count; d++) to[d] = from_bf16(((const uint16_t *)from)[d]);
  else
    memcpy(to, from, count * sizeof(float));
  for (int d = count; d < padded; d++) to[d] = 0;
}

/* Point at the chunk's keys [first, last) in the pages. */
INLINE void find_rows(const attention_args *a, scratch *s, const task *t, int start, int first, int last, int size) {
  int64_t row_bytes = (int64_t)a->num_kv_heads * a->head_dim * size;
  const int32_t *table = a->block_tables + t->seq * a->table_stride;
  int block = (start + first) / a->block_size, slot = (start + first) % a->block_size;
  for (int j = first; j < last; j++) {
    int64_t place = ((int64_t)table[block] * a->block_size + slot) * row_bytes;
    s->key_rows[j] = (const char *)a->keys + place;
    s->value_rows[j] = (const char *)a->values + place;
    if (++slot == a->block_size) block++, slot = 0;
  }
  s->head_bytes = (int64_t)a->head_dim * size;
}

/* Copy the task's keys and values of a chunk into float32 rows of whole lanes, and point there. */
INLINE void pack_rows(const attention_args *a, scratch *s, const task *t, int first, int last, int is_bf16) {
  int padded = (a->head_dim + LANES - 1) / LANES * LANES;
  for (int j = first; j < last; j++) {
    for (int h = t->first_head; h < t->last_head; h++) {
      int64_t place = ((int64_t)h * CHUNK + j) * padded;
      copy_to_f32(s->packed_keys + place, s->key_rows[j] + h * s->head_bytes, a->head_dim, padded, is_bf16);
      copy_to_f32(s->packed_values + place, s->value_rows[j] + h * s->head_bytes, a->head_dim, padded, is_bf16);
    }
    s->key_rows[j] = (const char *)(s->packed_keys + (int64_t)j * padded);
    s->value_rows[j] = (const char *)(s->packed_values + (int64_t)j * padded);
  }
  s->head_bytes = (int64_t)CHUNK * padded * sizeof(float);
}

/* Say what to fetch while a key or value is read: the one AHEAD of it, and values after the last keys. */
INLINE void look_ahead(scratch *s, int first, int last) {
  for (int j = first; j < last; j++) {
    int beyond = j + AHEAD - last;
    s->key_ahead[j] = beyond < 0 ? s->key_rows[j + AHEAD] : s->value_rows[at_most(first + beyond, last - 1)];
    s->value_ahead[j] = s->value_rows[at_most(j + AHEAD, last - 1)];
  }
}

INLINE void attend_chunk(const attention_args *a, scratch *s, const task *t, int start, int rows_per_head, int is_packed,
                         int is_bf16) {
  int dim_lanes = (a->head_dim + LANES - 1) / LANES, first_row_first, last_row_last, unused;
  int num_heads = t->last_head - t->first_head, reads_bf16 = is_bf16 && !is_packed;
  seen_keys(a, s, 0, start, &first_row_first, &unused);
  seen_keys(a, s, rows_per_head - 1, start, &unused, &last_row_last);
  int first = at_least(0, first_row_first) / NUM_SUMS * NUM_SUMS, last = last_row_last;
  find_rows(a, s, t, start, first, last, is_bf16 ? 2 : 4);
  if (is_packed) pack_rows(a, s, t, first, last, is_bf16);
  for (int j = last; j < CHUNK && j % NUM_SUMS != 0; j++) s->key_rows[j] = s->key_rows[last - 1];
  if (s->looks_ahead) look_ahead(s, first, last);
  for (int block = first; block < last; block += KEY_BLOCK)
    for (int h = 0; h < num_heads; h++)
      score_block(s, h * rows_per_head, rows_per_head, dim_lanes, (t->first_head + h) * s->head_bytes, block,
                  at_most(block + KEY_BLOCK, last), reads_bf16);
  float chunk_maximum[num_heads * rows_per_head], chunk_total[num_heads * rows_per_head];
  for (int row = 0; row < num_heads * rows_per_head; row++) {
    int row_first, row_last;
    seen_keys(a, s, row, start, &row_first, &row_last);
    chunk_total[row] = -1; /* sees none of them */
    if (row_first < row_last)
      weigh(s->scores + (int64_t)row * CHUNK, row_first, row_last, a->scaling, a->softcap, &chunk_maximum[row],
            &chunk_total[row]);
  }
  memset(s->part, 0, (size_t)num_heads * rows_per_head * dim_lanes * LANES * sizeof(float));
  for (int block = first; block < last; block += KEY_BLOCK)
    for (int h = 0; h < num_heads; h++)
      value_block(a, s, h * rows_per_head, rows_per_head, dim_lanes, (t->first_head + h) * s->head_bytes, start, block,
                  at_most(block + KEY_BLOCK, last), reads_bf16);
  for (int row = 0; row < num_heads * rows_per_head; row++) {
    int64_t place = (int64_t)row * dim_lanes * LANES;
    if (!(chunk_total[row] < 0))
      merge(s->sum + place, s->part + place, dim_lanes, &s->maximum[row], &s->total[row], chunk_maximum[row],
            chunk_total[row]);
  }
}

INLINE void run_task(const attention_args *a, scratch *s, const task *t, int is_bf16) {
  int group = a->num_heads / a->num_kv_heads, num_tokens = t->last_token - t->first_token, row = 0;
  int dim_lanes = (a->head_dim + LANES - 1) / LANES, padded = dim_lanes * LANES, size = is_bf16 ? 2 : 4;
  int query_start = a->query_start[t->seq];
  int offset = a->context_lens[t->seq] - (a->query_start[t->seq + 1] - query_start); /* position of the first query */
  /* Copies pay where many rows read them, and make head_dim a whole number of lanes. They change no bit. */
  int is_packed = a->head_dim % LANES != 0 || (is_bf16 && num_tokens > 1);
  for (int h = t->first_head; h < t->last_head; h++)
    for (int token = t->first_token; token < t->last_token; token++)
      for (int g = 0; g < group; g++, row++) {
        int head = h * group + g;
        const char *q = (const char *)a->q +
                        ((query_start + token) * a->q_strides[0] + head * a->q_strides[1]) * size;
        copy_to_f32(s->q + (int64_t)row * padded, q, a->head_dim, padded, is_bf16);
        s->position[row] = offset + token;
        s->maximum[row] = a->sinks ? a->sinks[head] : -INFINITY;
        s->total[row] = a->sinks ? 1 : 0;
      }
  s->looks_ahead = num_tokens == 1 && !is_packed;
  memset(s->sum, 0, (size_t)row * padded * sizeof(float));
  int first_key = a->sliding_window > 0 ? at_least(0, s->position[0] - a->sliding_window + 1) : 0;
  for (int start = first_key / CHUNK * CHUNK; start <= s->position[row - 1]; start += CHUNK)
    attend_chunk(a, s, t, start, num_tokens * group, is_packed, is_bf16);
  row = 0;
  for (int h = t->first_head; h < t->last_head; h++)
    for (int token = t->first_token; token < t->last_token; token++)
      for (int g = 0; g < group; g++, row++) {
        int64_t place = ((int64_t)(query_start + token) * a->num_heads + h * group + g) * a->head_dim;
        for (int d = 0; d < a->head_dim; d++) {
          float value = s->sum[(int64_t)row * padded + d] / s->total[row];
          if (is_bf16)
            ((uint16_t *)a->out)[place + d] = to_bf16(value);
          else
            ((float *)a->out)[place + d] = value;
        }
      }
}

static void run_task_f32(const attention_args *a, scratch *s, const task *t) { run_task(a, s, t, 0); }
static void run_task_bf16(const attention_args *a, scratch *s, const task *t) { run_task(a, s, t, 1); }

/* Copy a token's keys and values into its slot. */
static void write_token(const attention_args *a, int token, int size) {
  int64_t row_bytes = (int64_t)a->head_dim * size;
  for (int h = 0; h < a->num_kv_heads; h++) {
    int64_t place = (a->slot_mapping[token] * a->num_kv_heads + h) * row_bytes;
    memcpy((char *)a->keys + place, (const char *)a->k + (token * a->k_strides[0] + h * a->k_strides[1]) * size,
           row_bytes);
    memcpy((char *)a->values + place, (const char *)a->v + (token * a->v_strides[0] + h * a->v_strides[1]) * size,
           row_bytes);
  }
}

/* Query tokens of one task of a prefill. */
static int tile_tokens(const attention_args *a) {
  return at_least(1, TILE_ROWS / (a->num_heads / a->num_kv_heads));
}

/* Cut the step into tasks, the long ones first; returns how many, and in `work` their multiply-adds. */
static int cut_tasks(const attention_args *a, task *tasks, int64_t *work) {
  int count = 0, tile = tile_tokens(a), num_decodes = 0;
  *work = 0;
  for (int seq = a->num_seqs - 1; seq >= 0; seq--) {
    int length = a->query_start[seq + 1] - a->query_start[seq];
    *work += (int64_t)length * a->context_lens[seq] * a->num_heads * a->head_dim;
    if (length == 1) num_decodes++;
    for (int last = length; length > 1 && last > 0; last -= tile)
      for (int h = 0; h < a->num_kv_heads; h++)
        tasks[count++] = (task){seq, at_least(0, last - tile), last, h, h + 1};
  }
  /* Whole sequences while there are plenty for all threads, else a kv head at a time. */
  int heads = num_decodes >= 4 * a->num_threads ? a->num_kv_heads : 1;
  for (int seq = 0; seq < a->num_seqs; seq++)
    for (int h = 0; a->query_start[seq + 1] - a->query_start[seq] == 1 && h < a->num_kv_heads; h += heads)
      tasks[count++] = (task){seq, 0, 1, h, at_most(h + heads, a->num_kv_heads)};
  return count;
}

static int64_t max_tasks(const attention_args *a) {
  int64_t count = 0;
  for (int seq = 0; seq < a->num_seqs; seq++)
    count += (a->query_start[seq + 1] - a->query_start[seq] + tile_tokens(a) - 1) / tile_tokens(a);
  return count * a->num_kv_heads;
}

/* This thread's scratch, grown when needed and kept for the next call; NULL if there is no memory. */
static scratch *get_scratch(const attention_args *a) {
  static _Thread_local char *memory;
  static _Thread_local size_t memory_size;
  int64_t rows = at_least(tile_tokens(a) * (a->num_heads / a->num_kv_heads), a->num_heads);
  int64_t padded = (a->head_dim + LANES - 1) / LANES * LANES, packed = a->num_kv_heads * CHUNK * padded;
  size_t size = sizeof(scratch) + sizeof(float) * (rows * (3 * padded + CHUNK + 3) + 2 * packed);
  if (size > memory_size) {
    free(memory);
    memory = malloc(size);
    memory_size = memory ? size : 0;
  }
  if (!memory) return NULL;
  scratch *s = (scratch *)memory;
  s->q = (float *)(s + 1);
  s->part = s->q + rows * padded;
  s->sum = s->part + rows * padded;
  s->scores = s->sum + rows * padded;
  s->maximum = s->scores + rows * CHUNK;
  s->total = s->maximum + rows;
  s->position = (int32_t *)(s->total + rows);
  s->packed_keys = (float *)(s->position + rows);
  s->packed_values = s->packed_keys + packed;
  return s;
}

/* Write the step's keys and values into the pages, then attend. Returns 0, or 1 if there is no memory. */
static int attention(const attention_args *a, int size, void (*run)(const attention_args *, scratch *, const task *)) {
  int64_t work;
  task *tasks = malloc(sizeof(task) * (max_tasks(a) + 1));
  if (!tasks) return 1;
  int num_tasks = cut_tasks(a, tasks, &work), failed = 0;
#pragma omp parallel num_threads(a->num_threads) if (work > MIN_WORK)
  {
#pragma omp for schedule(static)
    for (int token = 0; token < a->num_tokens; token++) write_token(a, token, size);
    scratch *s = get_scratch(a);
    /* Tasks are taken one by one, so that a core that is busy with something else holds up one of them at most. */
#pragma omp for schedule(dynamic, 1)
    for (int i = 0; i < num_tasks; i++) {
      if (s)
        run(a, s, &tasks[i]);
      else
        failed = 1;
    }
  }
  free(tasks);
  return failed;
}

int promptmill_attention_f32(const attention_args *a) { return attention(a, 4, run_task_f32); }
int promptmill_attention_bf16(const attention_args *a) { return attention(a, 2, run_task_bf16); }
