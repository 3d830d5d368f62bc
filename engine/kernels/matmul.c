/* out = x @ weight.T + bias + addend in float32, with the weight packed once, and one arithmetic per row.
 *
 * An output is one chain of multiply-adds over k in ascending order, begun at 0, whatever tile, task or thread computes
 * it; then bias and addend are added, in this order. So a row's bits do not depend on its batch.
 *
 * A panel of the weight is [in_features, LANES], contiguous, with missing columns as zeros. Its elements may be of 16
 * bits: half of the bytes, and widened as they are read.
 */
#include "lanes.h"

#if WIDTH == 16
#define ROWS 12 /* accumulators: ROWS * PANELS * NUM_VECS of 32 vector registers */
#define PANELS 2
#else
#define ROWS 6 /* 12 of 16 registers with AVX2; 24 of 32 with NEON */
#define PANELS 1
#endif
#define WEIGHT_BYTES(a) size_of((a)->weight_format)
#define PANELS_STAY 1 /* 3% less time for 512 rows with 2 threads, where memory hands over 4 bytes a weight */

typedef struct {
  const float *x;      /* [num_rows, in_features], rows x_stride apart */
  const void *weight;  /* [num_panels, in_features, LANES] of the format */
  const float *bias;   /* [out_features], or NULL */
  const float *addend; /* [num_rows, out_features], contiguous, or NULL; may be out */
  float *out;          /* likewise */
  int64_t x_stride;
  int32_t num_rows, in_features, out_features, num_threads, weight_format;
} product_args;

#include "finish.h"
#include "tiles.h"

/* A function of its own: inlined into every tile it takes a compiler a minute. */
static __attribute__((noinline)) void finish(const product_args *a, int row, int column, const lanes *sum) {
  finish_lanes(a, row, column, *sum, F32, 0);
}

/* num_rows rows times num_panels panels; both are constants where it is inlined, and so is the weight's format. */
INLINE void tile_of(const product_args *a, int row, int panel, int num_rows, int num_panels, int64_t ahead, int pace,
                    int format) {
  lanes acc[ROWS][PANELS];
  int64_t panel_bytes = (int64_t)a->in_features * LANES * size_of(format);
  tile_rows rows = rows_from(a->x + row * a->x_stride, a->x_stride * sizeof(float));
  const char *weight = (const char *)a->weight + panel * panel_bytes, *next = weight + ahead;
  UNROLL(12)
  for (int r = 0; r < num_rows; r++)
    UNROLL(2)
    for (int p = 0; p < num_panels; p++) acc[r][p] = splat(0);
  for (int k = 0; k < a->in_features; k++, weight += LANES * size_of(format), next += pace) {
    lanes column[PANELS];
    UNROLL(2)
    for (int p = 0; p < num_panels; p++) {
      fetch(next + p * panel_bytes, pace);
      column[p] = load(weight + p * panel_bytes, 0, format);
    }
    UNROLL(12)
    for (int r = 0; r < num_rows; r++) {
      lanes value = splat(*(const float *)row_of(&rows, r));
      UNROLL(2)
      for (int p = 0; p < num_panels; p++) acc[r][p] = mul_add(value, column[p], acc[r][p]);
    }
    advance(&rows, num_rows, sizeof(float));
  }
  UNROLL(12)
  for (int r = 0; r < num_rows; r++)
    UNROLL(2)
    for (int p = 0; p < num_panels; p++) {
      lanes sum = acc[r][p]; /* a copy, so that the accumulators have no address and stay in registers */
      finish(a, row + r, (panel + p) * LANES, &sum);
    }
}

INLINE void tile(const product_args *a, int row, int panel, int num_rows, int num_panels, int64_t ahead, int pace) {
  if (a->weight_format == BF16)
    tile_of(a, row, panel, num_rows, num_panels, ahead, pace, BF16);
  else if (a->weight_format == F16)
    tile_of(a, row, panel, num_rows, num_panels, ahead, pace, F16);
  else
    tile_of(a, row, panel, num_rows, num_panels, ahead, pace, F32);
}

#include "panels.h"

int promptmill_matmul(const void *args) {
  multiply(args, NULL);
  return 0;
}
