/* out = x @ weight.T + bias + addend in float32, with the weight packed once, and one arithmetic per row.
 *
 * An output is one chain of multiply-adds over k in ascending order, begun at 0, whatever tile, task or thread computes
 * it; then bias and addend are added, in this order. So a row's bits do not depend on its batch.
 *
 * The weight lies in panels of LANES columns, each [in_features, LANES] and contiguous, missing columns as zeros: it is
 * read front to back. A task is a block of panels that stays in the L2 cache while all rows of a block pass over it.
 */
#include "lanes.h"

#if WIDTH == 16
#define ROWS 12 /* accumulators: ROWS * PANELS * NUM_VECS of 32 vector registers */
#define PANELS 2
#else
#define ROWS 6 /* 12 of 16 registers with AVX2; 24 of 32 with NEON */
#define PANELS 1
#endif
#define BLOCK_BYTES (256 * 1024) /* of panels in one task: half of a common L2 */
#define BLOCK_ROWS (20 * ROWS)
#define MIN_WORK (1 << 17) /* multiply-adds below which a second thread costs more than it brings */

typedef struct {
  const float *x;      /* [num_rows, in_features], rows x_stride apart */
  const float *weight; /* [num_panels, in_features, LANES] */
  const float *bias;   /* [out_features], or NULL */
  const float *addend; /* [num_rows, out_features], rows out_stride apart, or NULL; may be out */
  float *out;          /* [num_rows, out_features], rows out_stride apart */
  int64_t x_stride, out_stride;
  int32_t num_rows, in_features, out_features, num_threads;
} matmul_args;

INLINE int at_most(int a, int b) { return a < b ? a : b; }
INLINE int at_least(int a, int b) { return a > b ? a : b; }

INLINE void finish(const matmul_args *a, int row, int column, lanes sum) {
  float values[LANES];
  int64_t place = row * a->out_stride + column;
  int count = at_most(LANES, a->out_features - column);
  if (count == LANES) {
    if (a->bias) {
      lanes bias = load_f32(a->bias + column);
      EACH_VEC sum.v[i] += bias.v[i];
    }
    if (a->addend) {
      lanes addend = load_f32(a->addend + place);
      EACH_VEC sum.v[i] += addend.v[i];
    }
    store(a->out + place, sum);
    return;
  }
  store(values, sum);
  for (int c = 0; c < count; c++) {
    if (a->bias) values[c] += a->bias[column + c];
    if (a->addend) values[c] += a->addend[place + c];
    a->out[place + c] = values[c];
  }
}

/* num_rows rows times num_panels panels; both are constants where it is inlined. */
INLINE void tile(const matmul_args *a, int row, int panel, int num_rows, int num_panels) {
  lanes acc[ROWS][PANELS];
  const float *x = a->x + row * a->x_stride, *weight = a->weight + (int64_t)panel * a->in_features * LANES;
  int64_t panel_size = (int64_t)a->in_features * LANES;
  const float *rows[ROWS];
#pragma GCC unroll 12
  for (int r = 0; r < num_rows; r++) {
    rows[r] = x + r * a->x_stride;
#pragma GCC unroll 2
    for (int p = 0; p < num_panels; p++) acc[r][p] = splat(0);
  }
  for (int64_t k = 0; k < a->in_features; k++) {
    lanes column[PANELS];
#pragma GCC unroll 2
    for (int p = 0; p < num_panels; p++) column[p] = load_f32(weight + p * panel_size + k * LANES);
#pragma GCC unroll 12
    for (int r = 0; r < num_rows; r++) {
      lanes value = splat(rows[r][k]);
#pragma GCC unroll 2
      for (int p = 0; p < num_panels; p++) acc[r][p] = mul_add(value, column[p], acc[r][p]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < num_rows; r++)
#pragma GCC unroll 2
    for (int p = 0; p < num_panels; p++) finish(a, row + r, (panel + p) * LANES, acc[r][p]);
}

#define CASE(count) \
  case count:       \
    tile(a, row, panel, count, num_panels); \
    break;

INLINE void rows_of_tile(const matmul_args *a, int row, int panel, int num_rows, int num_panels) {
  switch (num_rows) {
#if ROWS == 12
    CASE(12) CASE(11) CASE(10) CASE(9) CASE(8) CASE(7)
#endif
    CASE(6) CASE(5) CASE(4) CASE(3) CASE(2) CASE(1)
  }
}

static void block(const matmul_args *a, int first_row, int last_row, int first_panel, int last_panel) {
  /* Tiles of even height: 8 rows are two of 4, because a low tile waits for its few chains of additions. */
  int num_tiles = (last_row - first_row + ROWS - 1) / ROWS;
  for (int row = first_row, num_rows; num_tiles > 0; row += num_rows, num_tiles--) {
    int panel = first_panel;
    num_rows = (last_row - row + num_tiles - 1) / num_tiles;
    for (; panel + PANELS <= last_panel; panel += PANELS) rows_of_tile(a, row, panel, num_rows, PANELS);
    for (; panel < last_panel; panel++) rows_of_tile(a, row, panel, num_rows, 1);
  }
}

int promptmill_matmul(const matmul_args *a) {
  int num_panels = (a->out_features + LANES - 1) / LANES;
  int fitting = BLOCK_BYTES / (a->in_features * LANES * (int)sizeof(float));
  /* Several tasks a thread, taken one by one: a core that is busy with something else holds up one of them at most. */
  int step = at_least(PANELS, at_most(fitting, num_panels / (4 * a->num_threads)) / PANELS * PANELS);
  int num_steps = (num_panels + step - 1) / step, num_blocks = (a->num_rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
  int64_t work = (int64_t)a->num_rows * a->in_features * a->out_features;
#pragma omp parallel for schedule(dynamic, 1) num_threads(a->num_threads) if (work > MIN_WORK)
  for (int task = 0; task < num_steps * num_blocks; task++) {
    int first_row = task / num_steps * BLOCK_ROWS, first_panel = task % num_steps * step;
    block(a, first_row, at_most(first_row + BLOCK_ROWS, a->num_rows), first_panel,
          at_most(first_panel + step, num_panels));
  }
  return 0;
}
