/* Passes over rows of logits on a CPU, each row read from memory once or twice and none copied.
 *
 * The twin of the torch code in engine/sampler.py and engine/sampling_noise.py, which state what is computed; x is
 * (logit - max) / temperature there and here. A row is one thread's, in one order.
 */
#include <stdlib.h>

#include "lanes.h"

#define BLOCK 64 /* logits whose maximum is kept: most blocks are passed over by it alone */
#define MAX_BLOCK 4096 /* logits, half of a common L1: where the largest is, is sought again */

typedef struct {
  const float *logits;      /* [*, vocab_size], rows `row_stride` apart */
  const int64_t *rows;      /* [num_rows], which rows of logits, or NULL: all in order */
  const float *temperature; /* [num_rows] */
  const int32_t *keys;      /* [2, num_rows] */
  const float *min_p;       /* [num_rows] */
  int64_t *tokens;          /* [num_rows] */
  float *values;            /* [num_rows, num_candidates], x in descending order */
  int32_t *token_ids;       /* [num_rows, num_candidates] */
  double *mass;             /* [num_rows], of e^x over all tokens that min-p keeps */
  double *log_sum;          /* [num_rows], the largest logit plus the logarithm of the mass */
  const uint32_t *bits;     /* [num_rows, ceil(vocab_size / 32)], 1 for the tokens that may be sampled */
  int64_t row_stride;
  int32_t num_rows, vocab_size, num_candidates, num_threads;
} sampling_args;

typedef struct {
  float value;
  int32_t token_id;
} candidate;

#define BAD_LOGITS -1 /* as in engine/step_plan.py */

INLINE const float *logits_of(const sampling_args *a, int row) {
  return a->logits + (a->rows ? a->rows[row] : row) * a->row_stride;
}

INLINE int any_of(ints x) {
  uint64_t parts[WIDTH / 2], all = 0;
  memcpy(parts, &x, sizeof(parts));
  for (int i = 0; i < WIDTH / 2; i++) all |= parts[i];
  return all != 0;
}

/* The maximum of count logits; nan is passed over, and the runner looks for it. */
static float max_of(const float *logits, int count) {
  lanes most = splat(-INFINITY);
  float all[LANES];
  int t = 0;
  for (; t + LANES <= count; t += LANES) {
    lanes x = load_f32(logits + t);
    EACH_VEC most.v[i] = vec_max(x.v[i], most.v[i]);
  }
  store(all, most);
  for (; t < count; t++) all[0] = logits[t] > all[0] ? logits[t] : all[0];
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int l = 0; l < half; l++) all[l] = all[l] > all[l + half] ? all[l] : all[l + half];
  return all[0];
}

/* The first of the logits that is this one; 0 if none is. */
static int find(const float *logits, int vocab_size, float value) {
  int t = 0;
  for (; t + LANES <= vocab_size; t += LANES) {
    lanes x = load_f32(logits + t);
    ints found = {0};
    EACH_VEC found |= (ints)(x.v[i] == value);
    if (any_of(found)) break;
  }
  for (; t < vocab_size; t++)
    if (logits[t] == value) return t;
  return 0;
}

/* The largest logit's token, the lowest id among equals; `most`: the logit. Only its block is read twice. */
static int find_max(const float *logits, int vocab_size, float *most) {
  int where = 0;
  *most = -INFINITY;
  for (int begin = 0; begin < vocab_size; begin += MAX_BLOCK) {
    float highest = max_of(logits + begin, at_most(MAX_BLOCK, vocab_size - begin));
    if (highest > *most) *most = highest, where = begin;
  }
  return where + find(logits + where, at_most(MAX_BLOCK, vocab_size - where), *most);
}

INLINE words mix_32(words x) {
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= x >> 15;
  x *= 0x846CA68Bu;
  return x ^ x >> 16;
}

/* Gumbel noise of 32 random bits. */
static double gumbel(int32_t bits) { return -log(-log(((double)bits + 2147483648.5) * 0x1p-32)); }

INLINE int32_t token_bits(int token, uint32_t first_key, uint32_t second_key) {
  words x = mix_32(mix_32((words){0} + ((uint32_t)token ^ first_key)) ^ second_key);
  return (int32_t)x[0];
}

/* The least bits whose noise may lift a token that lies `gap` below the best score (see draw): those with
 * 1 - u = (2^32 - 0.5 - (bits + 2^31)) / 2^32 < e^gap, and a few more than rounding could take away. */
INLINE int32_t lowest_bits(float gap) {
  double lowest = 4294967295.5 - exp_one(gap) * 1.001 * 4294967296.0 - 2147483648.0;
  return lowest <= -2147483648.0 ? INT32_MIN : (int32_t)lowest;
}

/* The token with the largest x + noise. Noise g = -log(-log u) lifts x over `best` only if 1 - u < e^(x - best), so the
 * largest x of a block bounds what its tokens need, and nearly all of them are ruled out by their integer bits. */
static int draw(const float *logits, int vocab_size, float temperature, uint32_t first_key, uint32_t second_key) {
  float most;
  int token = find_max(logits, vocab_size, &most), first = token;
  if (!isfinite(most)) return token;
  double best = gumbel(token_bits(token, first_key, second_key));
  words ids;
  for (int i = 0; i < WIDTH; i++) ids[i] = i;
  for (int begin = 0; begin < vocab_size; begin += BLOCK) {
    int end = at_most(begin + BLOCK, vocab_size);
    float highest = (max_of(logits + begin, end - begin) - most) / temperature - (float)best;
    if (highest < -23) continue; /* e^-23 < 2^-33: no noise is large enough */
    int32_t bound = lowest_bits(highest);
    ints is_above[BLOCK / WIDTH], is_any_above = {0};
    words bits[BLOCK / WIDTH];
    for (int i = 0; i < BLOCK / WIDTH; i++) {
      bits[i] = mix_32(mix_32((ids + (uint32_t)(begin + i * WIDTH)) ^ first_key) ^ second_key);
      is_above[i] = (ints)((ints)bits[i] >= bound);
      is_any_above |= is_above[i];
    }
    if (!any_of(is_any_above)) continue;
    for (int i = 0, t = begin; t < end; i++, t++) {
      if (!is_above[i / WIDTH][i % WIDTH] || t == first) continue;
      float x = (logits[t] - most) / temperature;
      int32_t own = (int32_t)bits[i / WIDTH][i % WIDTH];
      if (own < lowest_bits(x - (float)best)) continue;
      double score = (double)x + gumbel(own);
      if (score > best || (score == best && t < token)) best = score, token = t;
    }
  }
  return token;
}

static int compare_candidates(const void *a, const void *b) {
  const candidate *x = a, *y = b;
  if (x->value != y->value) return x->value < y->value ? 1 : -1;
  return x->token_id < y->token_id ? -1 : 1;
}

static int compare_descending(const void *a, const void *b) {
  float x = *(const float *)a, y = *(const float *)b;
  return (x < y) - (x > y);
}

/* The mass of e^x over the tokens whose e^x is at least min_p: in float by lanes for a block, then in double. */
static double mass_of(const float *logits, int vocab_size, float most, float temperature, float min_p) {
  double mass = 0;
  for (int begin = 0; begin < vocab_size; begin += BLOCK) {
    lanes sum = splat(0);
    for (int t = begin; t < at_most(begin + BLOCK, vocab_size); t += LANES) {
      float tail[LANES];
      for (int l = 0; t + LANES > vocab_size && l < LANES; l++)
        tail[l] = t + l < vocab_size ? logits[t + l] : -INFINITY;
      lanes x = load_f32(t + LANES > vocab_size ? tail : logits + t);
      EACH_VEC {
        vec weight = vec_exp((x.v[i] - most) / temperature);
        sum.v[i] += (vec)((ints)weight & (ints)(weight >= min_p));
      }
    }
    mass += sum_of_lanes(sum);
  }
  return mass;
}

/* The num_candidates largest x of a row, equal ones by id, and the row's mass. Returns 0, or 1 without memory.
 *
 * As many blocks as candidates are wanted have a maximum of at least the num_candidates-th largest maximum, so at least
 * that many logits lie at or above it: only they are sorted. */
static int find_candidates(const sampling_args *a, int row) {
  const float *logits = logits_of(a, row);
  int num_blocks = (a->vocab_size + BLOCK - 1) / BLOCK, count = 0;
  float *maxima = malloc(2 * num_blocks * sizeof(float)), *sorted = maxima + num_blocks, bound = -INFINITY;
  candidate *found = malloc(a->vocab_size * sizeof(candidate));
  int failed = !maxima || !found;
  if (!failed) {
    float most = -INFINITY, temperature = a->temperature[row];
    for (int b = 0; b < num_blocks; b++) {
      maxima[b] = max_of(logits + b * BLOCK, at_most(BLOCK, a->vocab_size - b * BLOCK));
      most = maxima[b] > most ? maxima[b] : most;
    }
    if (!a->num_candidates) {
      bound = INFINITY; /* only the sum is wanted */
    } else if (num_blocks > a->num_candidates) {
      memcpy(sorted, maxima, num_blocks * sizeof(float));
      qsort(sorted, num_blocks, sizeof(float), compare_descending);
      bound = sorted[a->num_candidates - 1];
    }
    for (int b = 0; b < num_blocks; b++)
      for (int t = b * BLOCK; maxima[b] >= bound && t < at_most((b + 1) * BLOCK, a->vocab_size); t++)
        if (logits[t] >= bound && logits[t] != -INFINITY) found[count++] = (candidate){logits[t], t};
    qsort(found, count, sizeof(candidate), compare_candidates);
    while (count < a->num_candidates) found[count++] = (candidate){-INFINITY, 0}; /* a mask left fewer tokens */
    for (int i = 0; i < a->num_candidates; i++) {
      a->values[(int64_t)row * a->num_candidates + i] = (found[i].value - most) / temperature;
      a->token_ids[(int64_t)row * a->num_candidates + i] = found[i].token_id;
    }
    a->mass[row] = mass_of(logits, a->vocab_size, most, temperature, a->min_p[row]);
    a->log_sum[row] = most + log(a->mass[row]);
  }
  free(maxima);
  free(found);
  return failed;
}

#define EACH_ROW                                                                            \
  _Pragma("omp parallel for schedule(dynamic, 1) num_threads(a->num_threads)") for (int row = 0; row < a->num_rows; \
                                                                                    row++)

/* Minus infinity in place of every logit whose bit is 0. Mutates the rows. */
int promptmill_mask(const sampling_args *a) {
  EACH_ROW {
    float *logits = (float *)logits_of(a, row);
    const uint32_t *words = a->bits + (int64_t)row * ((a->vocab_size + 31) / 32);
    for (int begin = 0; begin < a->vocab_size; begin += 32) {
      uint32_t word = words[begin / 32];
      if (word == UINT32_MAX) continue;
      for (int t = begin; t < at_most(begin + 32, a->vocab_size); t++, word >>= 1)
        if (!(word & 1)) logits[t] = -INFINITY;
    }
  }
  return 0;
}

/* The token with the largest logit, the lowest id among equals. */
int promptmill_argmax(const sampling_args *a) {
  EACH_ROW {
    const float *logits = logits_of(a, row);
    float most;
    a->tokens[row] = find_max(logits, a->vocab_size, &most);
  }
  return 0;
}

/* BAD_LOGITS in place of a token whose logit, or whose row's first, is nan or too large; whose logit is minus infinity. */
int promptmill_settle(const sampling_args *a) {
  for (int row = 0; row < a->num_rows; row++) {
    const float *logits = logits_of(a, row);
    if (!(logits[0] < INFINITY && fabsf(logits[a->tokens[row]]) < INFINITY)) a->tokens[row] = BAD_LOGITS;
  }
  return 0;
}

int promptmill_draw(const sampling_args *a) {
  EACH_ROW {
    const float *logits = logits_of(a, row);
    a->tokens[row] = draw(logits, a->vocab_size, a->temperature[row], (uint32_t)a->keys[row],
                          (uint32_t)a->keys[a->num_rows + row]);
  }
  return 0;
}

int promptmill_candidates(const sampling_args *a) {
  int failed = 0;
  EACH_ROW if (find_candidates(a, row)) failed = 1;
  return failed;
}
