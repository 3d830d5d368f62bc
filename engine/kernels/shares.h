/* Tasks shared out among the threads of a parallel region: each has a range of neighbours, which it takes in order, so that
 * what it fetched ahead is what it needs next. A thread that is done takes the last tasks of the others: a core that is
 * busy with something else holds up one task at most.
 */
#ifndef PROMPTMILL_SHARES_H
#define PROMPTMILL_SHARES_H

#include <stdatomic.h>
#include <stdint.h>

extern int omp_get_thread_num(void); /* Apple's compiler has no omp.h */

typedef struct {
  _Alignas(64) _Atomic uint64_t range; /* first and end of what is left: 32 bits each, end above */
} share;

INLINE void share_out(share *shares, int num_threads, int num_tasks) {
  for (int64_t t = 0; t < num_threads; t++) {
    uint64_t first = t * num_tasks / num_threads, end = (t + 1) * num_tasks / num_threads;
    atomic_init(&shares[t].range, first | end << 32);
  }
}

/* Take the first or, as a thief, the last task; -1: none is left. */
INLINE int take(share *s, int is_thief) {
  uint64_t range = atomic_load_explicit(&s->range, memory_order_relaxed), rest;
  uint32_t first, end;
  do {
    first = (uint32_t)range, end = range >> 32;
    if (first >= end) return -1;
    rest = is_thief ? first | (uint64_t)(end - 1) << 32 : (first + 1) | (uint64_t)end << 32;
  } while (!atomic_compare_exchange_weak_explicit(&s->range, &range, rest, memory_order_relaxed, memory_order_relaxed));
  return is_thief ? end - 1 : first;
}

/* This thread's next task; -1: all are taken. */
INLINE int next_task(share *shares, int num_threads) {
  int own = omp_get_thread_num(), task = -1;
  for (int i = 0; i < num_threads && task < 0; i++) task = take(&shares[(own + i) % num_threads], i > 0);
  return task;
}

#endif
