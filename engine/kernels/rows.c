/* What lies between the matrix products of a decoder: RMS norms, rotary embedding, gated activations, rows of a table.
 *
 * Every row is one thread's, computed in float32 in one order. In bfloat16 results are rounded where transformers'
 * modules round them. What a product in 8 bits takes leaves in these, from the core that has it in its L1 cache, instead of
 * as it is: the same bits as where the product quantises it. The formulas stand at each function; the twins are
 * transformers' own modules.
 */
#include "quantise.h"
#include "barrier.h"
#include "room.h"

#define MIN_WORK (1 << 15) /* elements below which a second thread costs more than it brings */
#define GLU_WORK 8           /* elements of the others that one of an activation costs as much as */
#define AT_ONCE rows_at_once(a->num_rows, a->num_threads)
#define EACH_ROW                                                              \
  barrier here = {0};                                                         \
  _Pragma("omp parallel num_threads(a->num_threads) if (work > MIN_WORK)")    \
  for (int is_done = 0; !is_done; is_done = 1, wait_for_team(&here))          \
  _Pragma("omp for schedule(dynamic, AT_ONCE) nowait")

typedef struct {
  const void *x;      /* [num_rows, num_groups, size], rows x_stride apart */
  const void *weight; /* [size] */
  void *out;          /* likewise, rows out_stride apart; may be x; unwritten where rows leave in 8 bits */
  quantised rows;     /* those, of one group; or NULL */
  int64_t x_stride, out_stride;
  int32_t num_rows, num_groups, size, adds_one, rounds_first, is_bf16, num_threads;
  float epsilon;
} norm_args;

typedef struct {
  void *x;               /* [num_rows, num_heads, head_dim], rows x_stride apart */
  const void *cos, *sin; /* [num_rows, size], rows angle_stride apart */
  int64_t x_stride, angle_stride;
  int32_t num_rows, num_heads, head_dim, size, is_bf16, num_threads;
} rope_args;

typedef struct {
  const void *x; /* [num_rows, 2 * size], contiguous: gate, then up */
  void *out;     /* [num_rows, size], contiguous; unwritten where rows leave in 8 bits */
  quantised rows; /* those, or NULL */
  int32_t num_rows, size, is_gelu, is_bf16, num_threads;
} glu_args;

typedef struct {
  const void *table;            /* [table_rows, size] of table_format, contiguous */
  const int64_t *const *places; /* which of them, [num_rows]: found at the time of the call */
  void *out;                    /* [num_rows, size], contiguous */
  int64_t table_rows;
  int32_t num_rows, size, table_format, is_bf16;
} gather_args;

typedef struct {
  int (*function)(const void *args); /* returns 0 where it succeeds */
  int64_t size;                      /* bytes of its arguments, which follow: a multiple of 8 */
  int64_t rows_at;                   /* where among them their number of rows stands, int32; or -1 */
} chained_call;

/* Rows that a thread takes: several times each, and not too often. */
INLINE int rows_at_once(int num_rows, int num_threads) {
  int count = num_rows / (4 * num_threads);
  return count < 1 ? 1 : count > 8 ? 8 : count;
}

INLINE lanes product_of(lanes a, lanes b) {
  EACH_VEC a.v[i] *= b.v[i];
  return a;
}

/* out = x / sqrt(mean(x^2) + epsilon) * weight, or * (1 + weight). */
INLINE void norm_group(const norm_args *a, const void *x, void *out, int is_bf16) {
  lanes squares = splat(0);
  int first = 0, size = a->size, rounds_first = a->rounds_first;
  for (; first + LANES <= size; first += LANES) {
    lanes value = load(at(x, first, is_bf16), 0, is_bf16);
    squares = mul_add(value, value, squares);
  }
  float total = sum_of_lanes(squares);
  for (; first < size; first++) {
    float value = get(x, first, is_bf16);
    total += value * value;
  }
  float factor = 1.0f / sqrtf(total / (float)size + a->epsilon), one = a->adds_one ? 1.0f : 0.0f;
  const void *weights = a->weight;
  for (first = 0; first < size; first += LANES) {
    lanes value = load_part(x, first, size, is_bf16), weight = load_part(weights, first, size, is_bf16);
    EACH_VEC value.v[i] *= factor;
    if (rounds_first) value = rounded(value, is_bf16);
    EACH_VEC value.v[i] *= one + weight.v[i];
    store_part(out, first, size, value, is_bf16);
  }
}

/* As rows of 8 bits. Returns 1 if there is no memory. */
INLINE int norm_to_codes(const norm_args *a, int is_bf16) {
  int64_t work = (int64_t)a->num_rows * a->size;
  int failed = 0;
  EACH_ROW
  for (int row = 0; row < a->num_rows; row++) {
    void *normed = take_room((size_t)a->size * size_of(is_bf16));
    if (normed) {
      norm_group(a, at(a->x, row * a->x_stride, is_bf16), normed, is_bf16);
      quantise_row(&a->rows, row, normed, a->size, is_bf16);
    } else {
      failed = 1;
    }
  }
  return failed;
}

INLINE void norm(const norm_args *a, int is_bf16) {
  int64_t work = (int64_t)a->num_rows * a->num_groups * a->size;
  EACH_ROW
  for (int row = 0; row < a->num_rows; row++)
    for (int group = 0; group < a->num_groups; group++) {
      int64_t place = (int64_t)group * a->size;
      norm_group(a, at(a->x, row * a->x_stride + place, is_bf16),
                 (void *)at(a->out, row * a->out_stride + place, is_bf16), is_bf16);
    }
}

/* x = x * cos + rotate_half(x) * sin over the first `size` of each head, in place. */
INLINE void rope_head(void *x, const void *cos, const void *sin, int half, int is_bf16) {
  void *x_high = (void *)at(x, half, is_bf16);
  const void *cos_high = at(cos, half, is_bf16), *sin_high = at(sin, half, is_bf16);
  for (int first = 0; first < half; first += LANES) {
    lanes low = load_part(x, first, half, is_bf16), high = load_part(x_high, first, half, is_bf16);
    lanes low_cos = rounded(product_of(low, load_part(cos, first, half, is_bf16)), is_bf16);
    lanes high_cos = rounded(product_of(high, load_part(cos_high, first, half, is_bf16)), is_bf16);
    lanes high_sin = rounded(product_of(high, load_part(sin, first, half, is_bf16)), is_bf16);
    lanes low_sin = rounded(product_of(low, load_part(sin_high, first, half, is_bf16)), is_bf16);
    EACH_VEC low.v[i] = low_cos.v[i] - high_sin.v[i];
    EACH_VEC high.v[i] = high_cos.v[i] + low_sin.v[i];
    store_part(x, first, half, low, is_bf16);
    store_part(x_high, first, half, high, is_bf16);
  }
}

INLINE void rope(const rope_args *a, int is_bf16) {
  int64_t work = (int64_t)a->num_rows * a->num_heads * a->size;
  EACH_ROW
  for (int row = 0; row < a->num_rows; row++)
    for (int head = 0; head < a->num_heads; head++) {
      int64_t place = row * a->x_stride + (int64_t)head * a->head_dim;
      rope_head((void *)at(a->x, place, is_bf16), at(a->cos, row * a->angle_stride, is_bf16),
                at(a->sin, row * a->angle_stride, is_bf16), a->size / 2, is_bf16);
    }
}

/* x / (1 + e^-x), within 2^-24 * (8 + 2 |x|) of it, relatively; nan stays nan. */
INLINE lanes silu(lanes x) {
  EACH_VEC {
    vec power = x.v[i] * -1.44269504088896341f;
    ints is_large = (ints)(power > 126.0f);
    vec bounded = (vec)(((ints)(126.0f - (vec){0}) & is_large) | ((ints)power & ~is_large));
    x.v[i] = x.v[i] / (1.0f + vec_exp2(bounded));
  }
  return x;
}

/* x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3))) */
INLINE lanes gelu_tanh(lanes x) {
  EACH_VEC {
    vec inner = (x.v[i] + x.v[i] * x.v[i] * x.v[i] * 0.044715f) * 0.7978845608028654f;
    x.v[i] = x.v[i] * 0.5f * (1.0f + vec_tanh(inner));
  }
  return x;
}

/* out = activation(gate) * up */
INLINE void glu_row(const glu_args *a, const void *gate, const void *up, void *out, int is_bf16) {
  int size = a->size, is_gelu = a->is_gelu;
  for (int first = 0; first < size; first += LANES) {
    lanes x = load_part(gate, first, size, is_bf16);
    lanes active = rounded(is_gelu ? gelu_tanh(x) : silu(x), is_bf16);
    store_part(out, first, size, product_of(active, load_part(up, first, size, is_bf16)), is_bf16);
  }
}

/* Returns 1 if there is no memory. */
INLINE int glu(const glu_args *a, int is_bf16) {
  int64_t work = (int64_t)a->num_rows * a->size * GLU_WORK;
  int failed = 0;
  EACH_ROW
  for (int row = 0; row < a->num_rows; row++) {
    int64_t place = (int64_t)row * a->size;
    int leaves_in_codes = a->rows.codes != NULL;
    void *out = leaves_in_codes ? take_room((size_t)a->size * size_of(is_bf16)) : (void *)at(a->out, place, is_bf16);
    if (!out) {
      failed = 1;
      continue;
    }
    glu_row(a, at(a->x, 2 * place, is_bf16), at(a->x, 2 * place + a->size, is_bf16), out, is_bf16);
    if (leaves_in_codes) quantise_row(&a->rows, row, out, a->size, is_bf16);
  }
  return failed;
}

/* out[row] = table[places[row]]; nan where the table has no such row. */
INLINE void gather(const gather_args *a, int table_format, int is_bf16) {
  int size = a->size;
  for (int row = 0; row < a->num_rows; row++) {
    int64_t place = (*a->places)[row];
    int is_there = place >= 0 && place < a->table_rows;
    const void *from = at(a->table, is_there ? place * size : 0, table_format);
    void *to = (void *)at(a->out, (int64_t)row * size, is_bf16);
    if (is_there && table_format == is_bf16) {
      memcpy(to, from, (size_t)size * size_of(is_bf16));
      continue;
    }
    for (int first = 0; first < size; first += LANES)
      store_part(to, first, size, is_there ? load_part(from, first, size, table_format) : splat(NAN), is_bf16);
  }
}

int promptmill_norm(const void *args) {
  const norm_args *a = args;
  if (a->rows.codes) return a->is_bf16 ? norm_to_codes(a, 1) : norm_to_codes(a, 0);
  a->is_bf16 ? norm(a, 1) : norm(a, 0);
  return 0;
}

int promptmill_rope(const void *args) {
  const rope_args *a = args;
  a->is_bf16 ? rope(a, 1) : rope(a, 0);
  return 0;
}

int promptmill_glu(const void *args) {
  const glu_args *a = args;
  return a->is_bf16 ? glu(a, 1) : glu(a, 0);
}

int promptmill_gather(const void *args) {
  const gather_args *a = args;
  if (a->is_bf16)
    a->table_format == BF16 ? gather(a, BF16, 1) : a->table_format == F16 ? gather(a, F16, 1) : gather(a, F32, 1);
  else
    a->table_format == BF16 ? gather(a, BF16, 0) : a->table_format == F16 ? gather(a, F16, 0) : gather(a, F32, 0);
  return 0;
}

/* Calls of these functions and of the products', one behind the other: each with `size` bytes of arguments behind it, in
 * which this sets the number of rows. Stops at one that fails, and returns what it did. */
int promptmill_chain(char *calls, int64_t num_bytes, int32_t num_rows) {
  for (const char *end = calls + num_bytes; calls < end;) {
    chained_call *call = (chained_call *)calls;
    if (call->rows_at >= 0) memcpy((char *)(call + 1) + call->rows_at, &num_rows, sizeof num_rows);
    int failed = call->function(call + 1);
    if (failed) return failed;
    calls += sizeof *call + call->size;
  }
  return 0;
}

/* A chain over some of a step's rows, in segments; each call computes with one thread. */
typedef struct {
  char *calls;
  int64_t num_rows;
  _Atomic uint32_t state; /* twice the segments that are done, and 1 while a thread computes the next */
} band;

#define NONE_NOW (-1) /* a band waits for one before it, which another thread has */
#define NONE_LEFT (-2)

/* The band that is least far, for this thread. */
static int take_band(band *bands, int num_bands, uint32_t num_segments, int in_order) {
  for (;;) {
    int found = -1, waits = 0;
    uint32_t least = 2 * num_segments, least_before = num_segments; /* segments done by each band before */
    for (int i = 0; i < num_bands; i++) {
      uint32_t state = atomic_load(&bands[i].state);
      if (state % 2 == 0 && state < least) {
        if (in_order && state / 2 > least_before)
          waits = 1;
        else
          found = i, least = state;
      }
      if (state / 2 < least_before) least_before = state / 2;
    }
    if (found < 0) return waits ? NONE_NOW : NONE_LEFT;
    if (atomic_compare_exchange_strong(&bands[found].state, &least, least + 1)) return found;
  }
}

/* The same chain over several bands of rows. A thread takes one segment of one band after the other, so that the threads
 * wait for each other at the end alone, and read the same weights at about the same time. With more bands than threads the
 * others have work while another process has the core of one. segment_ends: [num_segments], in bytes from the first call.
 * in_order: a segment reads what earlier segments of the bands before its own have written. Returns 0, or what a call that
 * fails did: then some calls did not run. */
int promptmill_bands(band *bands, const int64_t *segment_ends, int32_t num_bands, int32_t num_segments, int32_t in_order,
                     int32_t num_threads) {
  int failed = 0;
  barrier here = {0};
#pragma omp parallel num_threads(num_threads)
  {
    for (int i, turn = 0; (i = take_band(bands, num_bands, num_segments, in_order)) != NONE_LEFT;) {
      if (i == NONE_NOW) {
        rest(turn++);
        continue;
      }
      turn = 0;
      uint32_t segment = bands[i].state / 2;
      int64_t begin = segment ? segment_ends[segment - 1] : 0;
      int result = promptmill_chain(bands[i].calls + begin, segment_ends[segment] - begin, bands[i].num_rows);
      if (result) {
#pragma omp atomic write
        failed = result;
        segment = num_segments - 1; /* what follows is nothing's input any more */
      }
      atomic_store(&bands[i].state, 2 * (segment + 1));
    }
    wait_for_team(&here);
  }
  return failed;
}
