/* out = x @ weight.T + bias + addend in bfloat16, by the CPU's own products of pairs, with one arithmetic per row.
 *
 * An output is one chain of VDPBF16PS over pairs of k in ascending order, in float32, begun at 0, whatever tile, task or
 * thread computes it; then the bias is added, and, rounded, the addend. So a row's bits do not depend on its batch. The
 * instruction takes numbers below 2^-126 for zeros.
 *
 * A panel of the weight is [ceil(in_features / 2), LANES, 2], contiguous, with what is missing as zeros.
 */
#include "lanes.h"

#if !defined(__AVX512BF16__)
#error "this compiler makes no products of bfloat16 for this CPU"
#endif

#define ROWS 12 /* accumulators: ROWS * PANELS of 32 vector registers */
#define PANELS 2
#define WEIGHT_BYTES(a) 2
#define PANELS_STAY 1

typedef struct {
  const uint16_t *x;      /* [num_rows, in_features], rows x_stride apart */
  const uint16_t *weight; /* [num_panels, pairs, LANES, 2] */
  const float *bias;      /* [out_features], or NULL */
  const uint16_t *addend; /* [num_rows, out_features], contiguous, or NULL; may be out */
  void *out;              /* likewise */
  int64_t x_stride;
  int32_t num_rows, in_features, out_features, num_threads;
  int32_t widens;         /* whether the numbers that come out are written as float32 */
} product_args;

#include "finish.h"
#include "tiles.h"

/* A function of its own: inlined into every tile it takes a compiler a minute. */
static __attribute__((noinline)) void finish(const product_args *a, int row, int column, const lanes *sum) {
  finish_lanes(a, row, column, *sum, 1, a->widens);
}

/* acc[row][panel] += the products of a pair of each row with one of each column. */
INLINE void add_pair(__m512 acc[ROWS][PANELS], const tile_rows *rows, int is_half, const uint16_t *weight,
                     int64_t panel_size, const char *next, int pace, int num_rows, int num_panels) {
  __m512bh columns[PANELS];
  UNROLL(2)
  for (int p = 0; p < num_panels; p++) {
    fetch(next + p * panel_size * 2, pace);
    columns[p] = (__m512bh)_mm512_loadu_si512(weight + p * panel_size);
  }
  UNROLL(12)
  for (int r = 0; r < num_rows; r++) {
    int32_t pair = 0;
    memcpy(&pair, row_of(rows, r), is_half ? 2 : 4);
    __m512bh values = (__m512bh)_mm512_set1_epi32(pair);
    UNROLL(2)
    for (int p = 0; p < num_panels; p++) acc[r][p] = _mm512_dpbf16_ps(acc[r][p], values, columns[p]);
  }
}

/* num_rows rows times num_panels panels; both are constants where it is inlined. */
INLINE void tile(const product_args *a, int row, int panel, int num_rows, int num_panels, int64_t ahead, int pace) {
  int num_pairs = a->in_features / 2;
  int64_t panel_size = (int64_t)(a->in_features + 1) / 2 * 2 * LANES;
  tile_rows rows = rows_from(a->x + row * a->x_stride, a->x_stride * 2);
  const uint16_t *weight = a->weight + panel * panel_size;
  const char *next = (const char *)weight + ahead;
  __m512 acc[ROWS][PANELS];
  UNROLL(12)
  for (int r = 0; r < num_rows; r++)
    UNROLL(2)
    for (int p = 0; p < num_panels; p++) acc[r][p] = _mm512_setzero_ps();
  for (int k = 0; k < num_pairs; k++, weight += 2 * LANES, next += pace) {
    add_pair(acc, &rows, 0, weight, panel_size, next, pace, num_rows, num_panels);
    advance(&rows, num_rows, 4);
  }
  if (a->in_features % 2) add_pair(acc, &rows, 1, weight, panel_size, next, pace, num_rows, num_panels);
  if (num_panels == 2 && is_plain_pair(a, panel * LANES)) {
    UNROLL(12)
    for (int r = 0; r < num_rows; r++) finish_pair(a, row + r, panel * LANES, acc[r][0], acc[r][1], a->widens);
    return;
  }
  UNROLL(12)
  for (int r = 0; r < num_rows; r++)
    UNROLL(2)
    for (int p = 0; p < num_panels; p++) {
      lanes sum = {{(vec)acc[r][p]}}; /* a copy, so that the accumulators have no address and stay in registers */
      finish(a, row + r, (panel + p) * LANES, &sum);
    }
}

#include "panels.h"

int promptmill_matmul_bf16(const void *args) {
  multiply(args, NULL);
  return 0;
}
