/* The walk of a product of rows with a packed weight: tasks, blocks and tiles. Which of them computes a row changes no
 * bit of it.
 *
 * The weight lies in panels of LANES columns, each read front to back. All rows of a block pass over a panel before the
 * next, of which each of their tiles fetches its part: memory is read all the time that is computed. A task is a block of
 * panels, which fits the L2 cache, with a block of rows; a thread takes neighbours in order (shares.h).
 *
 * Included by a kernel that has defined: ROWS and PANELS, the tile that its registers hold; WEIGHT_BYTES(args), the size
 * of an element; PANELS_STAY, whether the next task has the same panels, or else the same rows; `product_args` with num_rows,
 * in_features, out_features and num_threads; and `tile(args, row, panel, num_rows, num_panels, ahead, pace)`, whose counts
 * are constants where it is inlined, and which fetches what lies `ahead` bytes behind each of its panels, `pace` bytes of
 * it for each line that it reads (tiles.h).
 */
#include "barrier.h"
#include "shares.h"

#define BLOCK_BYTES (256 * 1024) /* of panels in one task: half of a common L2 */
#define BLOCK_ROWS (20 * ROWS)
#define TASKS 16 /* of each thread, at least, where there are so many tiles */
#define MIN_WORK (1 << 17) /* multiply-adds below which a second thread costs more than it brings */

#define CASE(count) \
  case count:       \
    tile(a, row, panel, count, num_panels, ahead, pace); \
    break;

INLINE void rows_of_tile(const product_args *a, int row, int panel, int num_rows, int num_panels, int64_t ahead, int pace) {
  switch (num_rows) {
#if ROWS == 12
    CASE(12) CASE(11) CASE(10) CASE(9) CASE(8) CASE(7)
#endif
#if ROWS >= 6
    CASE(6)
#endif
    CASE(5) CASE(4) CASE(3) CASE(2) CASE(1)
  }
}

static void block(const product_args *a, int first_row, int last_row, int first_panel, int last_panel) {
  /* Tiles of even height: 8 rows are two of 4, because a low tile waits for its few chains of additions. */
  int num_tiles = parts_of(last_row - first_row, ROWS);
  if (num_tiles <= 0) return;
  int64_t panel_bytes = (int64_t)a->in_features * LANES * WEIGHT_BYTES(a);
  int pace = parts_of(LINE, num_tiles); /* the tiles' parts overlap rather than leave a line out */
  for (int panel = first_panel, num_panels; panel < last_panel; panel += num_panels) {
    num_panels = panel + PANELS <= last_panel ? PANELS : 1;
    for (int row = first_row, num_rows, left = num_tiles; left > 0; row += num_rows, left--) {
      int64_t ahead = panel_bytes * num_panels + (num_tiles - left) * panel_bytes / num_tiles;
      num_rows = (last_row - row + left - 1) / left;
      if (num_panels == PANELS)
        rows_of_tile(a, row, panel, num_rows, PANELS, ahead, pace);
      else
        rows_of_tile(a, row, panel, num_rows, 1, ahead, pace);
    }
  }
}

/* How many threads the product is worth. */
INLINE int threads_for(const product_args *a) {
  return (int64_t)a->num_rows * a->in_features * a->out_features > MIN_WORK ? a->num_threads : 1;
}

/* How a product is cut: blocks of panels, which fit the L2 cache, by blocks of rows. */
typedef struct {
  int num_panels, num_tiles, num_steps, num_blocks, block_rows;
} product_cut;

static product_cut cut_product(const product_args *a) {
  product_cut c;
  c.num_panels = parts_of(a->out_features, LANES);
  c.num_tiles = parts_of(c.num_panels, PANELS);
  int fitting = at_least(1, BLOCK_BYTES / (a->in_features * PANELS * LANES * WEIGHT_BYTES(a)));
  c.num_steps = at_least(parts_of(c.num_tiles, fitting), at_most(TASKS * a->num_threads, c.num_tiles));
  c.num_blocks = at_least(1, parts_of(a->num_rows, BLOCK_ROWS)); /* rounded up, the last may be empty */
  c.block_rows = parts_of(parts_of(a->num_rows, c.num_blocks), ROWS) * ROWS;
  return c;
}

/* A thread's part of the product. */
static void take_part(const product_args *a, const product_cut *c, share *shares, int num_threads) {
  for (int task; (task = next_task(shares, num_threads)) >= 0;) {
    int first_row = (PANELS_STAY ? task % c->num_blocks : task / c->num_steps) * c->block_rows;
    int64_t step = PANELS_STAY ? task / c->num_blocks : task % c->num_steps;
    int first_tile = c->num_tiles * step / c->num_steps, last_tile = c->num_tiles * (step + 1) / c->num_steps;
    block(a, first_row, at_most(first_row + c->block_rows, a->num_rows), first_tile * PANELS,
          at_most(last_tile * PANELS, c->num_panels));
  }
}

/* The whole product. prepare: what its threads do first, together; or NULL. */
static void multiply(const product_args *a, void (*prepare)(const product_args *)) {
  int num_threads = threads_for(a);
  share shares[num_threads];
  product_cut cut = cut_product(a);
  share_out(shares, num_threads, cut.num_steps * cut.num_blocks);
  barrier here = {0};
#pragma omp parallel num_threads(num_threads)
  {
    if (prepare) {
      prepare(a);
      wait_for_team(&here);
    }
    take_part(a, &cut, shares, num_threads);
    wait_for_team(&here);
  }
}
