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
  uint16_t *out;          /* likewise */
  int64_t x_stride;
  int32_t num_rows, in_features, out_features, num_threads;
} product_args;

#include "finish.h"

/* A function of its own: inlined into every tile it takes a compiler a minute. */
static __attribute__((noinline)) void finish(const product_args *a, int row, int column, const lanes *sum) {
  finish_lanes(a, row, column, *sum, 1);
}

INLINE __m512 widened(__m256i halves) { return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16); }

/* The same for two whole panels without a bias, a tile's most common end. */
INLINE void finish_both(const product_args *a, int row, int column, __m512 low, __m512 high) {
  int64_t place = (int64_t)row * a->out_features + column;
  __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(high, low);
  if (a->addend) {
    __m512i addend = _mm512_loadu_si512(a->addend + place);
    low = widened(_mm512_castsi512_si256(rounded)) + widened(_mm512_castsi512_si256(addend));
    high = widened(_mm512_extracti64x4_epi64(rounded, 1)) + widened(_mm512_extracti64x4_epi64(addend, 1));
    rounded = (__m512i)_mm512_cvtne2ps_pbh(high, low);
  }
  _mm512_storeu_si512(a->out + place, rounded);
}

/* acc[row][panel] += the products of a pair of each row with one of each column. */
INLINE void add_pair(__m512 acc[ROWS][PANELS], const uint16_t *const *rows, int64_t k, int is_half, const uint16_t *weight,
                     int64_t panel_size, int64_t ahead, int num_rows, int num_panels) {
  __m512bh columns[PANELS];
  UNROLL(2)
  for (int p = 0; p < num_panels; p++) {
    const uint16_t *elements = weight + p * panel_size + k * LANES;
    __builtin_prefetch((const char *)elements + ahead);
    columns[p] = (__m512bh)_mm512_loadu_si512(elements);
  }
  UNROLL(12)
  for (int r = 0; r < num_rows; r++) {
    uint32_t pair = rows[r][k];
    if (!is_half) memcpy(&pair, rows[r] + k, sizeof pair);
    __m512bh values = (__m512bh)_mm512_set1_epi32((int32_t)pair);
    UNROLL(2)
    for (int p = 0; p < num_panels; p++) acc[r][p] = _mm512_dpbf16_ps(acc[r][p], values, columns[p]);
  }
}

/* num_rows rows times num_panels panels; both are constants where it is inlined. */
INLINE void tile(const product_args *a, int row, int panel, int num_rows, int num_panels, int64_t ahead) {
  int in_features = a->in_features, paired = in_features & ~1;
  int64_t panel_size = (int64_t)(in_features + 1) / 2 * 2 * LANES;
  const uint16_t *weight = a->weight + panel * panel_size, *rows[ROWS];
  __m512 acc[ROWS][PANELS];
  UNROLL(12)
  for (int r = 0; r < num_rows; r++) {
    rows[r] = a->x + (row + r) * a->x_stride;
    UNROLL(2)
    for (int p = 0; p < num_panels; p++) acc[r][p] = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < paired; k += 2)
    add_pair(acc, rows, k, 0, weight, panel_size, ahead, num_rows, num_panels);
  if (paired < in_features) add_pair(acc, rows, paired, 1, weight, panel_size, ahead, num_rows, num_panels);
  if (num_panels == 2 && !a->bias && (panel + 2) * LANES <= a->out_features) {
    UNROLL(12)
    for (int r = 0; r < num_rows; r++) finish_both(a, row + r, panel * LANES, acc[r][0], acc[r][1]);
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
  const product_args *a = args;
#pragma omp parallel num_threads(a->num_threads) if (has_work_for_threads(a))
  product(a);
  return 0;
}
