/* Attention over a paged KV cache on a CPU: prefill and decode in one function, with one arithmetic per row.
 *
 * The twin of engine/attention/torch_backend.py, which states the formula: keys in chunks of CHUNK counted from
 * position 0, chunks merged in order of position. A row (one query token, one head) is computed from its query and from
 * the keys and values it sees, each operation in a fixed order: q.k by lanes and then down their tree; the sum of a
 * chunk's exponentials by lanes and down the tree; the weighted values key by key. Tiles, tasks and threads choose only
 * when an operation happens, never which: a row's bits do not depend on them.
 *
 * A task is a tile of query tokens of one sequence, for one kv head or, for a decode, for a range of them, so that
 * whole pages are read front to back. Keys are taken in blocks of KEY_BLOCK that stay in the L1 cache for all rows of a
 * task.
 */
#include <stdlib.h>

#include "attention_rows.h"
#include "room.h"

#define TILE_ROWS 64  /* query tokens times heads of their group: 64 rows of 64 floats fill a third of a 48 KiB L1 */
#define MIN_WORK (1 << 16) /* multiply-adds below which a second thread costs more than it brings */
#define AHEAD 32      /* keys between what is read and what is fetched from memory meanwhile */

typedef struct {
  int32_t seq, first_token, last_token; /* tokens of the sequence's queries of this step */
  int32_t first_head, last_head;        /* kv heads */
} task;

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

INLINE void attend_chunk(const attention_args *a, scratch *s, const task *t, int start, int rows_per_head,
                         int is_packed, int is_bf16) {
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

/* This thread's scratch; NULL if there is no memory. */
static scratch *get_scratch(const attention_args *a) {
  int64_t rows = at_least(tile_tokens(a) * (a->num_heads / a->num_kv_heads), a->num_heads);
  int64_t padded = (a->head_dim + LANES - 1) / LANES * LANES, packed = a->num_kv_heads * CHUNK * padded;
  size_t size = sizeof(scratch) + sizeof(float) * (rows * (3 * padded + CHUNK + 3) + 2 * packed);
  scratch *s = take_room(size);
  if (!s) return NULL;
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
