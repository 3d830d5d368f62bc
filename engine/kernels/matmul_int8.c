/* out = x @ weight.T + bias + addend with both sides in 8 bits: sums are exact integers, so a row's bits depend on nothing else.
 *
 * A column of the weight is code * scale, code within [-127, 127]. A row of x is quantised when it comes, as quantise.h has
 * it, unless it comes so. The product of both is an integer; it becomes a float once, is scaled, and the bias is added;
 * then, rounded as `out` is, the addend.
 *
 * Compiled without fused multiply-adds, so that every CPU rounds alike. A panel of the weight is
 * [depth / DEPTH, 2, LANES, 4] codes, with missing columns and rows as zeros; depth is in_features, rounded up.
 */
#include "quantise.h"
#include "room.h"

#if WIDTH == 16
#define ROWS 12
#define PANELS 2
#elif WIDTH == 8
#define ROWS 5 /* 10 of 16 registers; the dot product needs the others */
#define PANELS 1
#else
#define ROWS 5
#define PANELS 1
#endif
#define WEIGHT_BYTES(a) 1
#define PANELS_STAY 0
#define QUANTISE_TASK 8       /* rows */
#define ROUND 12582912.0f     /* 1.5 * 2^23: adding it rounds to an integer in the low bits */

typedef struct {
  const void *x;          /* [num_rows, in_features], rows x_stride apart; unread where they come in 8 bits */
  quantised rows;         /* those, or NULL: they are quantised here */
  const int8_t *weight;   /* [num_panels, depth, LANES] in the order above */
  const float *scales;    /* [num_panels * LANES], of columns */
  const int32_t *totals;  /* [num_panels * LANES], sums of columns' codes */
  const float *bias;      /* [out_features], or NULL */
  const void *addend;     /* [num_rows, out_features], contiguous, or NULL; may be out */
  void *out;              /* likewise */
  int64_t x_stride;
  int32_t num_rows, in_features, out_features, is_bf16, num_threads;
  int32_t widens;         /* whether the numbers of bfloat16 that come out are written as float32 */
} product_args;

typedef struct {
  const void *weight; /* [out_features, in_features], contiguous */
  int8_t *codes;      /* as `weight` above */
  float *scales;
  int32_t *totals;
  int32_t in_features, out_features, is_bf16, num_threads;
} pack_args;

#include "finish.h"
#include "tiles.h"

/* What a panel's columns share. */
typedef struct {
  lanes scales;
  int_lanes totals;
} panel_scales;

INLINE panel_scales scales_at(const product_args *a, int column) {
  panel_scales s = {.scales = load_f32(a->scales + column)};
  memcpy(&s.totals, a->totals + column, sizeof s.totals);
  return s;
}

/* What a row's exact sums stand for; taking off what the zero point brought is exact too. */
INLINE lanes scaled(const product_args *a, int row, const panel_scales *s, const int_lanes *sums) {
  lanes result;
  EACH_VEC result.v[i] = __builtin_convertvector(sums->v[i] - s->totals.v[i] * a->rows.zeros[row], vec) *
                         (s->scales.v[i] * a->rows.scales[row]);
  return result;
}

INLINE void finish_panel(const product_args *a, int row, int column, int num_rows, const int_lanes *sums, int stride,
                         int is_bf16, int widens) {
  panel_scales scales = scales_at(a, column);
  for (int r = row; r < row + num_rows; r++, sums += stride)
    finish_lanes(a, r, column, scaled(a, r, &scales, sums), is_bf16, widens);
}

/* A tile's sums. A function of its own: inlined into every tile it takes a compiler a minute. */
static __attribute__((noinline)) void finish(const product_args *a, int row, int panel, int num_rows, int num_panels,
                                             const int_lanes *sums) {
#if defined(__AVX512BF16__)
  if (a->is_bf16 && num_panels == 2 && is_plain_pair(a, panel * LANES)) {
    panel_scales low = scales_at(a, panel * LANES), high = scales_at(a, (panel + 1) * LANES);
    for (int r = row; r < row + num_rows; r++, sums += 2)
      finish_pair(a, r, panel * LANES, (__m512)scaled(a, r, &low, sums).v[0], (__m512)scaled(a, r, &high, sums + 1).v[0],
                  a->widens);
    return;
  }
#endif
  for (int p = 0; p < num_panels; p++) {
    int column = (panel + p) * LANES;
    a->is_bf16 ? finish_panel(a, row, column, num_rows, sums + p, num_panels, 1, a->widens)
               : finish_panel(a, row, column, num_rows, sums + p, num_panels, 0, 0);
  }
}

/* num_rows rows times num_panels panels; both are constants where it is inlined. */
INLINE void tile(const product_args *a, int row, int panel, int num_rows, int num_panels, int64_t ahead, int pace) {
  int depth = depth_of(a->in_features);
  int64_t panel_bytes = (int64_t)depth * LANES;
  int_lanes acc[ROWS][PANELS];
  tile_rows rows = rows_from(a->rows.codes + (int64_t)row * depth, depth);
  const int8_t *weight = a->weight + panel * panel_bytes;
  const char *next = (const char *)weight + ahead;
  UNROLL(12)
  for (int r = 0; r < num_rows; r++)
    UNROLL(2)
    for (int p = 0; p < num_panels; p++) acc[r][p] = (int_lanes){0};
  for (int k = 0; k < depth; k += DEPTH, weight += DEPTH * LANES, next += 2 * pace) {
    UNROLL(2)
    for (int p = 0; p < num_panels; p++) {
      fetch(next + p * panel_bytes, pace);
      fetch(next + p * panel_bytes + pace, pace);
    }
    UNROLL(12)
    for (int r = 0; r < num_rows; r++)
      UNROLL(2)
      for (int p = 0; p < num_panels; p++) dot(&acc[r][p], (const uint8_t *)row_of(&rows, r), weight + p * panel_bytes);
    advance(&rows, num_rows, DEPTH);
  }
  int_lanes sums[ROWS * PANELS]; /* a copy, so that the accumulators have no address and stay in registers */
  UNROLL(12)
  for (int r = 0; r < num_rows; r++)
    UNROLL(2)
    for (int p = 0; p < num_panels; p++) sums[r * num_panels + p] = acc[r][p];
  finish(a, row, panel, num_rows, num_panels, sums);
}

#include "panels.h"

/* Called by every thread of a parallel region. */
static void quantise_rows(const product_args *a) {
#pragma omp for schedule(dynamic, 1) nowait
  for (int task = 0; task < parts_of(a->num_rows, QUANTISE_TASK); task++)
    for (int row = task * QUANTISE_TASK; row < at_most((task + 1) * QUANTISE_TASK, a->num_rows); row++) {
      const void *x = at(a->x, row * a->x_stride, a->is_bf16);
      a->is_bf16 ? quantise_row(&a->rows, row, x, a->in_features, 1) : quantise_row(&a->rows, row, x, a->in_features, 0);
    }
}

/* Room for the rows in 8 bits. Returns 1 if there is no memory. */
static int place_rows(product_args *a) {
  size_t num_rows = a->num_rows, codes_size = num_rows * depth_of(a->in_features);
  char *room = take_room(codes_size + num_rows * (sizeof(float) + sizeof(int32_t))); /* depths are multiples of 8 */
  if (!room) return 1;
  a->rows.codes = (uint8_t *)room;
  a->rows.scales = (float *)(room + codes_size);
  a->rows.zeros = (int32_t *)(a->rows.scales + num_rows);
  return 0;
}

/* Returns 0, or 1 if there is no memory. */
int promptmill_matmul_int8(const void *given) {
  product_args args, *a = &args;
  memcpy(a, given, sizeof args);
  if (!a->num_rows) return 0; /* nothing takes no room */
  if (a->rows.codes) {
    multiply(a, NULL);
  } else {
    if (place_rows(a)) return 1;
    multiply(a, quantise_rows);
  }
  return 0;
}

/* The least scale with which a column's codes stay within 127, and each four that `dot` adds in 16 bits within
 * MAX_FOUR: roundings add up to 2 to it. */
static float scale_of_column(const void *column, int size, int is_bf16) {
  float most = 0, most_of_four = 0;
  for (int first = 0; first < size; first += DEPTH) {
    float above[2] = {0}, below[2] = {0};
    for (int k = 0; k < DEPTH && first + k < size; k++) {
      float value = get(column, first + k, is_bf16);
      float *sums = value > 0 ? above : below, absolute = value > 0 ? value : -value;
      sums[FOUR_OF(k)] += absolute;
      most = absolute > most ? absolute : most;
    }
    for (int i = 0; i < 2; i++) {
      most_of_four = above[i] > most_of_four ? above[i] : most_of_four;
      most_of_four = below[i] > most_of_four ? below[i] : most_of_four;
    }
  }
  float scale = most / 127.0f, other = most_of_four / (MAX_FOUR - 2);
  return scale > other ? scale : other;
}

static void pack_column(const pack_args *a, int column) {
  int depth = depth_of(a->in_features);
  const void *values = at(a->weight, (int64_t)column * a->in_features, a->is_bf16);
  int8_t *codes = a->codes + (int64_t)(column / LANES) * depth * LANES + column % LANES * 4;
  float scale = scale_of_column(values, a->in_features, a->is_bf16);
  int32_t total = 0;
  for (int k = 0; k < a->in_features; k++) {
    int32_t code = scale > 0 ? (int32_t)((get(values, k, a->is_bf16) / scale + ROUND) - ROUND) : 0;
    codes[(int64_t)(k / 4) * 4 * LANES + k % 4] = (int8_t)code;
    total += code;
  }
  a->scales[column] = scale;
  a->totals[column] = total;
}

/* codes, scales, totals: zeros when it is called. */
void promptmill_pack_int8(const pack_args *a) {
#pragma omp parallel for schedule(dynamic, LANES) num_threads(a->num_threads)
  for (int column = 0; column < a->out_features; column++) pack_column(a, column);
}
