/* How threads of a parallel region wait for each other on cores that other processes use, too.
 *
 * Who waits spins for as long as mates usually take, then dozes: sleeps for a moment, again and again. A mate is late
 * because another process has its core; each time that our core falls idle Linux looks for a thread to move there, and
 * takes one that has been kept waiting for half a millisecond. In a barrier that spins on, or sleeps once, all threads
 * stand still for as long as one of them is kept waiting.
 */
#ifndef PROMPTMILL_BARRIER_H
#define PROMPTMILL_BARRIER_H

#include <stdatomic.h>
#include <stdint.h>
#include <time.h>

extern int omp_get_num_threads(void); /* Apple's compiler has no omp.h */

#define SPINS 2000 /* turns: some 40 microseconds */
#define DOZE_NS 50000

typedef struct {
  _Alignas(64) _Atomic uint32_t num_arrived, num_passed; /* num_passed: how often all had arrived */
} barrier;

/* A moment's wait for another thread; turn: how many there were before. */
static void rest(int turn) {
  if (turn >= SPINS) {
    nanosleep(&(struct timespec){0, DOZE_NS}, NULL);
    return;
  }
#if defined(__x86_64__)
  __asm__ volatile("pause");
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

/* Returns when every thread of the region has called it. */
static void wait_for_team(barrier *b) {
  uint32_t team = omp_get_num_threads(), num_passed = atomic_load(&b->num_passed);
  if (atomic_fetch_add(&b->num_arrived, 1) + 1 == team) {
    atomic_store(&b->num_arrived, 0);
    atomic_store(&b->num_passed, num_passed + 1);
  }
  for (int turn = 0; atomic_load_explicit(&b->num_passed, memory_order_acquire) == num_passed; turn++) rest(turn);
}

#endif
