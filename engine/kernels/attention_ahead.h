/* What a decode reads from memory is asked for before: of its own chunk, of the next, and of the thread's next task.
 *
 * A piece is a panel of keys or values of one kv head. As each is read, the one that lies LEAD_BYTES behind it, in the order
 * in which they lie in memory, is asked for.
 */
#ifndef PROMPTMILL_ATTENTION_AHEAD_H
#define PROMPTMILL_ATTENTION_AHEAD_H

#include "attention_pages.h"

#define LEAD_BYTES (64 * 1024) /* less than 32 KiB is too late, more than 96 gains nothing (AMD Zen 4) */

/* A tile of one token of a longer prompt is none. */
INLINE int is_decode(const attention_args *a, const task *t) {
  return a->query_start[t->seq + 1] - a->query_start[t->seq] == 1;
}

/* List where the keys and then the values lie that a decode reads of the chunk from `start` on, panel by panel, each with
 * the task's heads; panels that complete the first block are the first one again. Returns how many. */
static int list_pieces(const attention_args *a, const task *t, int start, const char **pieces) {
  int position = a->context_lens[t->seq] - 1, count = 0;
  int first = a->sliding_window > 0 ? at_least(0, position - a->sliding_window + 1 - start) / LANES : 0;
  int end = lanes_of(at_most(CHUNK, position + 1 - start));
  const int32_t *table = a->block_tables + t->seq * a->table_stride;
  for (int is_value = 0; is_value < 2; is_value++)
    for (int p = first / BLOCK_PANELS * BLOCK_PANELS; p < end; p++) {
      int key = start + at_least(first, p) * LANES;
      const char *pages = (is_value ? a->values : a->keys) + key % a->block_size * slot_bytes(a);
      for (int h = t->first_head; h < t->last_head; h++)
        pieces[count++] = pages + head_place(a, table[key / a->block_size], h);
    }
  return count;
}

static int first_chunk(const attention_args *a, int position) {
  return a->sliding_window > 0 ? at_least(0, position - a->sliding_window + 1) / CHUNK * CHUNK : 0;
}

/* Ask for what a decode reads first of the chunk. Returns what it is to ask for while it reads: the rest, and then as much
 * of the chunk that is read next, which may be the next task's. */
static const char *const *begin_asking(const attention_args *a, scratch *s, const task *t, const task *next, int start) {
  int num_bytes = LANES * slot_bytes(a), lead = LEAD_BYTES / num_bytes;
  if (s->num_pieces == 0) s->num_pieces = list_pieces(a, t, start, s->pieces);
  for (; s->num_asked < at_most(lead, s->num_pieces); s->num_asked++)
    for (int i = 0; i < num_bytes; i += LINE) fetch_ahead(s->pieces[s->num_asked] + i);
  const char **behind = s->pieces + s->num_pieces;
  s->num_next = 0;
  if (start + CHUNK < a->context_lens[t->seq])
    s->num_next = list_pieces(a, t, start + CHUNK, behind);
  else if (next)
    s->num_next = list_pieces(a, next, first_chunk(a, a->context_lens[next->seq] - 1), behind);
  for (int i = s->num_next; i < s->num_asked + BLOCK_PANELS; i++) behind[i] = behind[i - 1];
  return s->pieces + s->num_asked;
}

/* What has been listed of the next chunk is that of this one now. */
static void end_asking(scratch *s) {
  memmove(s->pieces, s->pieces + s->num_pieces, s->num_next * sizeof *s->pieces);
  s->num_pieces = s->num_next;
  s->num_asked = at_most(s->num_asked, s->num_next);
}

#endif
