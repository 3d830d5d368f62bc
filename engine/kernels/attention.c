/* Attention over a paged KV cache on a CPU: prefill and decode in one function, with one arithmetic per row.
 *
 * The twin of engine/attention/torch_backend.py, which states the formula: keys in chunks of CHUNK counted from
 * position 0, chunks merged in order of position. A row (one query token, one head) is computed from its query and from
 * the keys and values it sees, each operation in a fixed order: q.k dimension by dimension; the sum of a chunk's
 * exponentials by lanes and down their tree; the weighted values key by key. Exponentials are powers of two: the query is
 * scaled by log2(e), too. Tiles, tasks and threads choose only when an operation happens, never which: a row's bits do
 * not depend on them. A CPU's own products of bfloat16 have an order and roundings of their own: see attention_bf16.h.
 *
 * A task is a tile of query tokens of one sequence, for one kv head or, for a decode, for a range of them, so that
 * whole pages are read front to back. Keys are taken in blocks of BLOCK_PANELS that stay in the L1 cache for all rows of
 * a task.
 */
#include <stddef.h>
#include <stdlib.h>

#include "attention_ahead.h"
#include "attention_softmax.h"
#include "barrier.h"
#include "room.h"

#define TILE_ROWS 64  /* query tokens times heads of their group: 64 rows of 64 floats fill a third of a 48 KiB L1 */
#define MIN_WORK (1 << 16) /* multiply-adds below which a second thread costs more than it brings */

/* Floats of a kv head's queries. */
INLINE int64_t queries_size(const attention_args *a, int rows_per_head) {
  return (int64_t)(rows_per_head + MAX_ROWS - 1) / MAX_ROWS * MAX_ROWS * a->head_dim;
}
/* Of panels: those of pages, or float32 copies. */
INLINE int panel_format(const attention_args *a) {
  if (!is_regular(a)) return F32;
  return HAS_PAIRS && a->format == BF16 && a->kv_format == BF16 ? BF16_PAIRS : a->kv_format;
}
/* Weights for I8 of all rows that see something of the chunk's keys [first, last). */
static void weigh_all_codes(const attention_args *a, scratch *s, const task *t, int rows_per_head, int first, int last) {
  int num_rows = (t->last_head - t->first_head) * rows_per_head, group = a->num_heads / a->num_kv_heads;
  float largest = 0;
  for (int row = 0; row < num_rows; row++) {
    int64_t scales = (t->first_head + row / rows_per_head) * s->head_bytes + a->head_dim * LANES;
    if (s->first[row] >= s->last[row]) continue;
    /* Heads of a group see the same values. */
    if (row % group == 0) largest = largest_scale(s->values, scales, s->first[row], s->last[row]);
    weigh_codes(s->scores + (int64_t)row * STRIDE, s->values, scales, largest, s->first[row], s->last[row], first, last,
                a->softcap, &s->chunk_maximum[row], &s->chunk_total[row]);
    s->weight_scale[row] = largest / LARGEST_WEIGHT;
  }
}

/* The chunk's part of each row: scores, weights and weighted values over the panels of its keys [first, last). */
INLINE void attend_panels(const attention_args *a, scratch *s, const task *t, int rows_per_head, int first, int last,
                          const char *const *ahead, int format) {
  int dim_lanes = lanes_of(a->head_dim), num_rows = (t->last_head - t->first_head) * rows_per_head;
  int begin = first / LANES / BLOCK_PANELS * BLOCK_PANELS, end = lanes_of(last);
  for (int p = begin; p < end; p += BLOCK_PANELS)
    for (int h = t->first_head; h < t->last_head; h++) {
      score_block(s, s->q + (h - t->first_head) * queries_size(a, rows_per_head), (h - t->first_head) * rows_per_head,
                  rows_per_head, a->head_dim, h * s->head_bytes, p, ahead, format);
      if (ahead) ahead += at_most(BLOCK_PANELS, end - p);
    }
  if (format == I8)
    weigh_all_codes(a, s, t, rows_per_head, first, last);
  else
    for (int row = 0; row < num_rows; row++)
      if (s->first[row] < s->last[row])
        weigh(s->scores + (int64_t)row * STRIDE, s->first[row], s->last[row], a->softcap, format, &s->chunk_maximum[row],
              &s->chunk_total[row]);
  memset(s->part, 0, (size_t)num_rows * dim_lanes * LANES * sizeof(float));
  for (int p = begin; p < end; p += BLOCK_PANELS)
    for (int h = t->first_head; h < t->last_head; h++) {
      value_block(s, (h - t->first_head) * rows_per_head, rows_per_head, dim_lanes, h * s->head_bytes,
                  at_least(first, p * LANES), at_most(last, (p + BLOCK_PANELS) * LANES), ahead, format);
      if (ahead) ahead += at_most(BLOCK_PANELS, end - p);
    }
  for (int row = 0; format == I8 && row < num_rows; row++)
    scale_values(s->part + row * dim_lanes * LANES, dim_lanes, s->weight_scale[row]);
}

typedef void attend_function(const attention_args *, scratch *, const task *, int, int, int, const char *const *);
#define ATTEND_PANELS(NAME, FORMAT) \
  static void NAME(const attention_args *a, scratch *s, const task *t, int rows_per_head, int first, int last, \
                   const char *const *ahead) { \
    attend_panels(a, s, t, rows_per_head, first, last, ahead, FORMAT); \
  }
ATTEND_PANELS(attend_f32, F32)
ATTEND_PANELS(attend_bf16, BF16)
ATTEND_PANELS(attend_f16, F16)
ATTEND_PANELS(attend_i8, I8)
#if HAS_PAIRS
ATTEND_PANELS(attend_pairs, BF16_PAIRS)
#else
#define attend_pairs NULL
#endif
static attend_function *const ATTEND[] = {
    [F32] = attend_f32, [BF16] = attend_bf16, [F16] = attend_f16, [I8] = attend_i8, [BF16_PAIRS] = attend_pairs};

static void attend_chunk(const attention_args *a, scratch *s, const task *t, const task *next, int start,
                         int rows_per_head) {
  int num_rows = (t->last_head - t->first_head) * rows_per_head, asks = is_regular(a) && is_decode(a, t);
  for (int row = 0; row < num_rows; row++) {
    s->first[row] = a->sliding_window > 0 ? at_least(0, s->position[row] - a->sliding_window + 1 - start) : 0;
    s->last[row] = at_most(CHUNK, s->position[row] + 1 - start);
  }
  int first = s->first[0], last = s->last[num_rows - 1];
  const int32_t *table = a->block_tables + t->seq * a->table_stride;
  if (is_regular(a))
    find_panels(a, s, table, start, first, last);
  else
    gather_panels(a, s, t, table, start, first, last);
  complete_block(s, first, last);
  const char *const *ahead = asks ? begin_asking(a, s, t, next, start) : NULL;
  ATTEND[panel_format(a)](a, s, t, rows_per_head, first, last, ahead);
  if (asks) end_asking(s);
  int64_t padded = padded_dim(a);
  for (int row = 0; row < num_rows; row++)
    if (s->first[row] < s->last[row])
      merge(s->sum + row * padded, s->part + row * padded, padded / LANES, &s->maximum[row], &s->total[row],
            s->chunk_maximum[row], s->chunk_total[row]);
}

static void run_task(const attention_args *a, scratch *s, const task *t, const task *next) {
  int group = a->num_heads / a->num_kv_heads, row = 0, query_start = a->query_start[t->seq];
  int rows_per_head = (t->last_token - t->first_token) * group;
  int offset = a->context_lens[t->seq] - (a->query_start[t->seq + 1] - query_start); /* position of the first query */
  int64_t padded = padded_dim(a);
  /* Scores are powers of two; a soft cap wants them first as they are. */
  float scaling = a->softcap > 0 ? a->scaling : a->scaling * LOG2_E;
  int format = panel_format(a);
  s->scaling = scaling;
  for (int h = t->first_head; h < t->last_head; h++)
    for (int i = 0; i < rows_per_head; i++, row++) {
      int token = query_start + t->first_token + i / group, head = h * group + i % group;
      const void *from = at(a->q, token * a->q_strides[0] + head * a->q_strides[1], a->format);
      float *q = s->q + (h - t->first_head) * queries_size(a, rows_per_head) + i / MAX_ROWS * MAX_ROWS * a->head_dim;
      s->queries[row] = from;
      if (format == I8)
        for (int b = 0; b < a->head_dim * size_of(a->format); b += LINE) __builtin_prefetch((const char *)from + b);
      else if (format != BF16_PAIRS)
        for (int d = 0; d < a->head_dim; d++) q[d * MAX_ROWS + i % MAX_ROWS] = get(from, d, a->format == F32 ? F32 : BF16) * scaling;
      s->position[row] = offset + t->first_token + i / group;
      s->maximum[row] = a->sinks ? a->sinks[head] * LOG2_E : -INFINITY;
      s->total[row] = a->sinks ? 1 : 0;
    }
  memset(s->sum, 0, (size_t)row * padded * sizeof(float));
  for (int i = 0; format == I8 && i < row; i++)
    s->query_scale[i] = round_query((int16_t *)s->q + i * a->head_dim, s->queries[i], a->head_dim, a->format) * scaling;
  for (int start = first_chunk(a, s->position[0]); start <= s->position[row - 1]; start += CHUNK)
    attend_chunk(a, s, t, next, start, rows_per_head);
  row = 0;
  for (int h = t->first_head; h < t->last_head; h++)
    for (int i = 0; i < rows_per_head; i++, row++) {
      int64_t token = query_start + t->first_token + i / group;
      void *out = (void *)at(a->out, (token * a->num_heads + h * group + i % group) * a->head_dim, a->format);
      for (int d = 0; d < a->head_dim; d += LANES) {
        lanes value = load_f32(s->sum + row * padded + d);
        value = divided(value, s->total[row]);
        store_part(out, d, a->head_dim, value, a->format);
      }
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

/* This thread's scratch; NULL if there is no memory. */
static scratch *get_scratch(const attention_args *a) {
  int64_t rows = at_least(tile_tokens(a) * (a->num_heads / a->num_kv_heads), a->num_heads);
  int64_t padded = padded_dim(a), packed = a->num_kv_heads * CHUNK * padded;
  int64_t queries = (rows + a->num_kv_heads * MAX_ROWS) * padded, pieces = 4 * NUM_PANELS * a->num_kv_heads + BLOCK_PANELS;
  size_t size = sizeof(scratch) + LINE + sizeof(float) * (queries + rows * (2 * padded + STRIDE + 9) + 2 * packed) +
                rows * sizeof *((scratch *)NULL)->queries + pieces * sizeof(char *);
  scratch *s = take_room(size);
  if (!s) return NULL;
  s->q = (float *)(((uintptr_t)(s + 1) + LINE - 1) / LINE * LINE);
  s->part = s->q + queries;
  s->sum = s->part + rows * padded;
  s->scores = s->sum + rows * padded;
  s->packed_keys = s->scores + rows * STRIDE;
  s->packed_values = s->packed_keys + packed;
  s->queries = (const uint16_t **)(s->packed_values + packed);
  s->pieces = (const char **)(s->queries + rows);
  s->num_pieces = s->num_asked = 0;
  s->maximum = (float *)(s->pieces + pieces);
  s->total = s->maximum + rows;
  s->chunk_maximum = s->total + rows;
  s->chunk_total = s->chunk_maximum + rows;
  s->query_scale = s->chunk_total + rows;
  s->weight_scale = s->query_scale + rows;
  s->position = (int32_t *)(s->weight_scale + rows);
  s->first = s->position + rows;
  s->last = s->first + rows;
  return s;
}

static int next_task(int *num_taken) {
  int task;
#pragma omp atomic capture
  task = (*num_taken)++;
  return task;
}

/* Write the step's keys and values into the pages, then attend, or one of the two. given: all before `query_start`.
 * Returns 0, or 1 if there is no memory. */
int promptmill_attention(const void *given) {
  attention_args args, *a = &args;
  memcpy(a, given, offsetof(attention_args, query_start));
  memcpy(&a->query_start, a->step, offsetof(attention_args, keys) - offsetof(attention_args, query_start));
  a->keys = a->cache + a->layer * a->layer_bytes;
  a->values = a->keys + a->keys_bytes;
  int64_t work = 0;
  int num_written = a->parts & WRITE_PART ? a->num_tokens : 0, num_tasks = 0, num_taken = 0, failed = 0;
  task *tasks = NULL;
  if (a->parts & ATTEND_PART) {
    tasks = malloc(sizeof(task) * (max_tasks(a) + 1));
    if (!tasks) return 1;
    num_tasks = cut_tasks(a, tasks, &work);
  }
  barrier here = {0};
#pragma omp parallel num_threads(a->num_threads) if (work > MIN_WORK)
  {
#pragma omp for schedule(static) nowait
    for (int token = 0; token < num_written; token++) {
      if (token + 1 < num_written) fetch_slot(a, token + 1);
      write_token(a, token);
    }
    wait_for_team(&here);
    scratch *s = num_tasks ? get_scratch(a) : NULL;
    /* Tasks are taken one by one, so that a core that is busy with something else holds up one of them at most; of decodes
     * it has one more, whose keys and values it asks for. */
    for (int i = next_task(&num_taken), next; i < num_tasks; i = next) {
      int asks = is_decode(a, &tasks[i]);
      if (asks) next = next_task(&num_taken);
      if (s)
        run_task(a, s, &tasks[i], asks && next < num_tasks ? &tasks[next] : NULL);
      else
        failed = 1;
      if (!asks) next = next_task(&num_taken);
    }
    wait_for_team(&here);
  }
  free(tasks);
  return failed;
}
