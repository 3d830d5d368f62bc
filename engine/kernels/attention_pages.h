/* Where keys and values lie: writing them, and finding a chunk's panels.
 *
 * Of a block's keys, [num_kv_heads, head_dim, block_size]; of its values, [num_kv_heads, block_size, head_dim]. In 8 bits
 * each kv head's panels lie one behind the other as attention_int8.h has them; without panels its codes lie as other
 * formats do, and block_size scales behind them.
 */
#ifndef PROMPTMILL_ATTENTION_PAGES_H
#define PROMPTMILL_ATTENTION_PAGES_H

#include "attention_rows.h"

typedef struct {
  int32_t seq, first_token, last_token; /* tokens of the sequence's queries of this step */
  int32_t first_head, last_head;        /* kv heads */
} task;

/* Whether the pages are made of panels. */
INLINE int is_regular(const attention_args *a) { return a->block_size % LANES == 0 && a->head_dim % LANES == 0; }
INLINE int64_t padded_dim(const attention_args *a) { return (int64_t)lanes_of(a->head_dim) * LANES; }
/* Of a key or value of one kv head. */
INLINE int64_t slot_bytes(const attention_args *a) {
  return (int64_t)a->head_dim * size_of(a->kv_format) + (a->kv_format == I8 ? sizeof(float) : 0);
}
INLINE int64_t head_bytes(const attention_args *a) { return slot_bytes(a) * a->block_size; }
/* Of a block's kv head, in the layer's keys or values. */
INLINE int64_t head_place(const attention_args *a, int64_t block, int head) {
  return (block * a->num_kv_heads + head) * head_bytes(a);
}

/* Point at the panels of the chunk's keys [first, last) in the pages. */
static void find_panels(const attention_args *a, scratch *s, const int32_t *table, int start, int first, int last) {
  for (int p = first / LANES; p * LANES < last; p++) {
    int64_t place = head_place(a, table[(start + p * LANES) / a->block_size], 0);
    int slot = (start + p * LANES) % a->block_size;
    s->keys[p] = a->keys + place + slot * (a->kv_format == I8 ? slot_bytes(a) : size_of(a->kv_format));
    s->values[p] = a->values + place + slot * slot_bytes(a);
  }
  s->head_bytes = head_bytes(a);
  s->key_step = a->block_size;
}

/* A slot's scale in a kv head of pages without panels. */
INLINE char *scale_behind(const attention_args *a, char *head, int slot) {
  return head + (int64_t)a->head_dim * a->block_size + slot * sizeof(float);
}

INLINE float scale_at(const attention_args *a, char *head, int slot) {
  float scale = 1;
  if (a->kv_format == I8) memcpy(&scale, scale_behind(a, head, slot), sizeof scale);
  return scale;
}

/* Make float32 panels of keys [first, last) that lie in blocks, or have dimensions, of no whole number of lanes. */
static void gather_panels(const attention_args *a, scratch *s, const task *t, const int32_t *table, int start, int first,
                          int last) {
  int64_t padded = padded_dim(a);
  for (int j = first; j < last; j++) {
    int slot = (start + j) % a->block_size;
    for (int h = t->first_head; h < t->last_head; h++) {
      int64_t head = head_place(a, table[(start + j) / a->block_size], h);
      char *head_keys = a->keys + head, *head_values = a->values + head;
      float *keys = s->packed_keys + (h * CHUNK + j / LANES * LANES) * padded + j % LANES;
      float *values = s->packed_values + (h * CHUNK + j) * padded;
      float key_scale = scale_at(a, head_keys, slot), value_scale = scale_at(a, head_values, slot);
      for (int d = 0; d < a->head_dim; d++) {
        keys[d * LANES] = get(head_keys, d * a->block_size + slot, a->kv_format) * key_scale;
        values[d] = get(head_values, slot * a->head_dim + d, a->kv_format) * value_scale;
      }
      for (int d = a->head_dim; d < padded; d++) values[d] = 0;
    }
  }
  for (int p = first / LANES; p * LANES < last; p++) {
    s->keys[p] = (const char *)(s->packed_keys + p * LANES * padded);
    s->values[p] = (const char *)(s->packed_values + p * LANES * padded);
  }
  s->head_bytes = (int64_t)CHUNK * padded * sizeof(float);
  s->key_step = LANES;
}

/* Point around the chunk's keys [first, last) too, in the blocks of panels that are scored as one: nobody uses it. */
static void complete_block(scratch *s, int first, int last) {
  int begin = first / LANES, end = lanes_of(last);
  for (int p = begin; p % BLOCK_PANELS != 0; p--) s->keys[p - 1] = s->keys[begin], s->values[p - 1] = s->values[begin];
  for (int p = end; p % BLOCK_PANELS != 0; p++) s->keys[p] = s->keys[end - 1], s->values[p] = s->values[end - 1];
}

/* Round a kv head's key or value, from `row`, into its slot. */
static void write_codes(const attention_args *a, const void *row, char *head, int slot, int is_value) {
  int regular = is_regular(a), line = slot % LANES;
  float largest = largest_of(row, a->head_dim, a->format), inverse = inverse_of(largest, LARGEST_CODE);
  float scale = scale_of(largest, LARGEST_CODE);
  if (is_value && scale != scale) scale = INFINITY; /* which a weight's scale takes over */
  char *panel = regular ? head + (slot - line) * slot_bytes(a) : head;
  memcpy(regular ? panel + a->head_dim * LANES + line * sizeof scale : scale_behind(a, head, slot), &scale, sizeof scale);
  for (int d = 0; d < a->head_dim; d += LANES) {
    int8_t codes[LANES];
    round_part(codes, row, d, a->head_dim, inverse, a->format);
    if (regular && is_value) {
      char *to = panel + line / 2 * 2 * a->head_dim + line % 2 + d * 2;
      for (int i = 0; i < LANES; i++) to[i * 2] = codes[i];
    } else if (regular) {
      char *to = panel + d * LANES + line * 2;
      for (int i = 0; i < LANES; i += 2) memcpy(to + i * LANES, codes + i, 2);
    } else {
      int64_t step = is_value ? 1 : a->block_size;
      char *to = head + (is_value ? slot * a->head_dim : slot) + d * step;
      for (int i = 0; i < at_most(LANES, a->head_dim - d); i++) to[i * step] = codes[i];
    }
  }
}

/* Ask for the lines that a token's keys and values will be written to: of a decode they come from memory, and stores wait
 * in line for them. */
static void fetch_slot(const attention_args *a, int token) {
  int64_t block = a->slot_mapping[token] / a->block_size, slot = a->slot_mapping[token] % a->block_size;
  int64_t size = size_of(a->kv_format), row_bytes = a->block_size * size, step = row_bytes < LINE ? LINE : row_bytes;
  int in_panels = a->kv_format == I8 && is_regular(a);
  for (int h = 0; h < a->num_kv_heads; h++) {
    const char *keys = a->keys + head_place(a, block, h), *values = a->values + head_place(a, block, h);
    const char *panel = keys + slot / LANES * LANES * slot_bytes(a);
    for (int64_t i = 0; in_panels && i < LANES * slot_bytes(a); i += LINE) __builtin_prefetch(panel + i, 1);
    for (int64_t i = 0; !in_panels && i < head_bytes(a); i += step) __builtin_prefetch(keys + slot * size + i, 1);
    const char *row = values + (in_panels ? slot & ~1 : slot) * a->head_dim * size;
    if (in_panels) {
      panel = values + slot / LANES * LANES * slot_bytes(a);
      row = panel + slot % LANES / 2 * 2 * a->head_dim;
      __builtin_prefetch(panel + LANES * a->head_dim, 1);
    }
    for (int64_t i = 0; i < a->head_dim * size * (1 + in_panels); i += LINE) __builtin_prefetch(row + i, 1);
  }
}

/* Copy a key or a value to elements `step` apart. */
INLINE void write_row(char *to, int64_t step, const void *row, int size, int format, int kv_format) {
  for (int d = 0; d < size; d++) put(to, d * step, get(row, d, format), kv_format);
}

/* Copy a token's keys and values into its slot. */
static void write_token(const attention_args *a, int token) {
  int64_t block = a->slot_mapping[token] / a->block_size, slot = a->slot_mapping[token] % a->block_size;
  for (int h = 0; h < a->num_kv_heads; h++) {
    char *keys = a->keys + head_place(a, block, h), *values = a->values + head_place(a, block, h);
    const void *k = at(a->k, token * a->k_strides[0] + h * a->k_strides[1], a->format);
    const void *v = at(a->v, token * a->v_strides[0] + h * a->v_strides[1], a->format);
    if (a->kv_format == I8) {
      write_codes(a, k, keys, slot, 0);
      write_codes(a, v, values, slot, 1);
      continue;
    }
    keys += slot * size_of(a->kv_format), values += slot * slot_bytes(a);
#define WRITE(FORMAT, KV_FORMAT) \
  if (a->format == FORMAT && a->kv_format == KV_FORMAT) { \
    write_row(keys, a->block_size, k, a->head_dim, FORMAT, KV_FORMAT); \
    write_row(values, 1, v, a->head_dim, FORMAT, KV_FORMAT); \
  }
    WRITE(F32, F32) WRITE(F32, BF16) WRITE(F32, F16) WRITE(BF16, F32) WRITE(BF16, BF16) WRITE(BF16, F16)
#undef WRITE
  }
}

#endif
