/* Scores and weighted values over keys and values in 8 bits, as exact sums of integers.
 *
 * A key or a value of a kv head is codes in [-127, 127] times a scale of its own. A query is rounded to 16 bits by its
 * largest number, and so are a row's weights of a chunk, times the scales of their values, by the largest that they may be.
 * Products of 16-bit numbers are summed by pairs in 32 bits, where a score and a chunk's weighted value have room: the same
 * sums on every instruction set, whatever their order. So a row adds nothing, exactly, for keys that it does not see.
 *
 * A panel is LANES codes of each two dimensions, or of values each two slots with all dimensions, in pairs; then LANES
 * scales.
 *
 * Included by attention_rows.h.
 */
#ifndef PROMPTMILL_ATTENTION_INT8_H
#define PROMPTMILL_ATTENTION_INT8_H

#define LARGEST_CODE 127
#define SMALLEST_SIZE 0x1p-100f /* numbers that are all below it are zeros: a scale has an inverse */
#define LARGEST_WEIGHT 32767    /* CHUNK products of it with codes have room in 32 bits */

typedef int8_t loose_codes __attribute__((vector_size(2 * WIDTH), aligned(1), may_alias));
typedef int16_t loose_shorts __attribute__((vector_size(2 * WIDTH), aligned(2), may_alias));

/* So that head_dim products with codes have room in 32 bits. */
INLINE float largest_query(int head_dim) { return at_most(32767, (1 << 24) / head_dim); }

/* 2 * WIDTH codes. */
INLINE shorts load_codes(const char *p) {
#if defined(__AVX512BW__)
  return (shorts)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__AVX2__) && !defined(__AVX512F__)
  return (shorts)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p));
#elif defined(__aarch64__)
  return (shorts)vmovl_s8(vld1_s8((const int8_t *)p));
#else
  return __builtin_convertvector(*(const loose_codes *)p, shorts);
#endif
}

/* acc += the products of two pairs, in each of WIDTH. */
INLINE ints add_pair_products(ints acc, shorts a, shorts b) {
#if defined(__AVX512VNNI__)
  return (ints)_mm512_dpwssd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
  return acc + (ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
  return (ints)_mm256_dpwssd_avx_epi32((__m256i)acc, (__m256i)a, (__m256i)b);
#elif defined(__AVX2__) && !defined(__AVX512F__)
  return acc + (ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__aarch64__)
  int32x4_t low = vmull_s16(vget_low_s16((int16x8_t)a), vget_low_s16((int16x8_t)b));
  return acc + (ints)vpaddq_s32(low, vmull_high_s16((int16x8_t)a, (int16x8_t)b));
#else
  ints even_a = (ints)((words)a << 16) >> 16, even_b = (ints)((words)b << 16) >> 16;
  return acc + even_a * even_b + ((ints)a >> 16) * ((ints)b >> 16);
#endif
}

INLINE ints pair_of(const int16_t *p) {
  int32_t pair;
  memcpy(&pair, p, sizeof pair);
  return pair - (ints){0};
}

/* acc[row] += the products of a pair of factors of the row, `stride` apart, with the `wide` times LANES pairs of codes that
 * lie `place` bytes into `codes`. What is held in registers meanwhile is the shorter of both. */
INLINE void add_codes(ints acc[MAX_ROWS][MAX_WIDE * NUM_VECS], const int16_t *factors, int64_t stride,
                      const char *const *codes, int64_t place, int num_rows, int wide) {
  shorts held[MAX_WIDE * NUM_VECS];
  if (num_rows > MAX_ROWS / 2 || WIDTH == 16) {
    UNROLL(8)
    for (int i = 0; i < wide * NUM_VECS; i++)
      held[i] = load_codes(codes[i / NUM_VECS] + place + i % NUM_VECS * 2 * WIDTH);
    UNROLL(6)
    for (int r = 0; r < num_rows; r++) {
      shorts pair = (shorts)pair_of(factors + r * stride);
      UNROLL(8)
      for (int i = 0; i < wide * NUM_VECS; i++) acc[r][i] = add_pair_products(acc[r][i], held[i], pair);
    }
  } else {
    UNROLL(3)
    for (int r = 0; r < num_rows; r++) held[r] = (shorts)pair_of(factors + r * stride);
    UNROLL(8)
    for (int i = 0; i < wide * NUM_VECS; i++) {
      shorts element = load_codes(codes[i / NUM_VECS] + place + i % NUM_VECS * 2 * WIDTH);
      UNROLL(3)
      for (int r = 0; r < num_rows; r++) acc[r][i] = add_pair_products(acc[r][i], element, held[r]);
    }
  }
}

/* `score_tile` of queries in 16 bits, head_dim apart. scales: of the products with each row's. */
INLINE void score_codes(const int16_t *queries, const float *scales, const char *const *keys, const char *const *ahead,
                        int64_t offset, int head_dim, float *scores, int num_rows, int wide) {
  ints acc[MAX_ROWS][MAX_WIDE * NUM_VECS];
  const char *codes[MAX_WIDE];
  for (int p = 0; p < wide; p++) codes[p] = keys[p] + offset;
  for (int r = 0; r < num_rows; r++)
    for (int i = 0; i < wide * NUM_VECS; i++) acc[r][i] = (ints){0};
  int64_t place = 0;
  const int16_t *q = queries;
#pragma GCC unroll 1
  for (int p = 0; p < wide; p++) {
    const char *line = ahead ? ahead[p] : NULL;
    if (ahead) fetch_ahead(line + head_dim * LANES);
    for (int64_t end = place + head_dim * LANES / wide; place < end; place += 2 * LANES, q += 2) {
      for (int i = 0; ahead && i < wide * 2 * LANES; i += LINE) fetch_ahead(line + i);
      line += wide * 2 * LANES;
      add_codes(acc, q, head_dim, codes, place, num_rows, wide);
    }
  }
  for (int p = 0; p < wide; p++) {
    lanes key_scales = load_f32((const float *)(codes[p] + head_dim * LANES));
    for (int r = 0; r < num_rows; r++) {
      lanes x;
      EACH_VEC x.v[i] = __builtin_convertvector(acc[r][p * NUM_VECS + i], vec) * key_scales.v[i] * scales[r];
      store(scores + r * STRIDE + p * LANES, x);
    }
  }
}

/* `value_tile` with weights in 16 bits, and sums in 32. */
INLINE void value_codes(int32_t *part, int64_t part_stride, const float *scores, const char *const *values,
                        const char *const *ahead, int64_t offset, int first, int last, int dim, int num_rows, int wide) {
  typedef int32_t loose_ints __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
  ints acc[MAX_ROWS][MAX_WIDE * NUM_VECS];
  int64_t step = part_stride * 2, start = (int64_t)dim * LANES * 2;
  part += dim * LANES;
  for (int r = 0; r < num_rows; r++)
    for (int i = 0; i < wide * NUM_VECS; i++) acc[r][i] = *(const loose_ints *)(part + r * part_stride + i * WIDTH);
  for (int j = first & ~1; j < last;) {
    int panel = j / LANES, end = at_most(last, (panel + 1) * LANES);
    const char *next = ahead ? ahead[panel % BLOCK_PANELS] + start : NULL, *codes[MAX_WIDE];
    for (int p = 0; p < wide; p++) codes[p] = values[panel] + offset + start + p * 2 * LANES;
    if (ahead && dim == 0) fetch_ahead(next + part_stride * LANES);
    for (int64_t place = j % LANES / 2 * step; j < end; j += 2, place += step) {
      for (int line = 0; ahead && line < wide * 2 * LANES; line += LINE) fetch_ahead(next + place + line);
      add_codes(acc, (const int16_t *)scores + j, 2 * STRIDE, codes, place, num_rows, wide);
    }
  }
  for (int r = 0; r < num_rows; r++)
    for (int i = 0; i < wide * NUM_VECS; i++) *(loose_ints *)(part + r * part_stride + i * WIDTH) = acc[r][i];
}

INLINE void store_shorts(int16_t *p, const ints *x) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  __m256i packed = _mm256_packs_epi32((__m256i)x[0], (__m256i)x[1]); /* in halves of each */
  _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(packed, 0xD8));
#else
  EACH_VEC *(loose_shorts *)(p + i * WIDTH) = __builtin_convertvector(x[i], loose_shorts);
#endif
}

/* The largest size of a row's numbers; nan if one of them is not finite. */
INLINE float largest_of(const void *row, int size, int format) {
  lanes most = splat(0), none = splat(0);
  const ints size_bits = (ints)((words){0} + 0x7FFFFFFFu);
  for (int d = 0; d < size; d += LANES) {
    lanes x = load_part(row, d, size, format);
    EACH_VEC {
      most.v[i] = vec_max((vec)((ints)x.v[i] & size_bits), most.v[i]);
      none.v[i] += x.v[i] - x.v[i];
    }
  }
  return max_of_lanes(most) + sum_of_lanes(none);
}

/* What a code that is `largest` at most stands for, where the largest of some numbers becomes it; 0 for zeros. */
INLINE float scale_of(float largest_number, float largest) {
  return largest_number < SMALLEST_SIZE ? 0 : largest_number / largest;
}
/* What numbers are multiplied with to become codes. */
INLINE float inverse_of(float largest_number, float largest) {
  return largest_number < SMALLEST_SIZE ? 0 : largest / largest_number;
}

/* A query in 16 bits; returns its scale. */
INLINE float round_query(int16_t *codes, const void *query, int head_dim, int format) {
  float largest = largest_of(query, head_dim, format), inverse = inverse_of(largest, largest_query(head_dim));
  for (int d = 0; d < head_dim; d += LANES) {
    lanes x = load(at(query, d, format), 0, format);
    ints nearest_codes[NUM_VECS];
    EACH_VEC nearest_codes[i] = nearest(x.v[i] * inverse);
    store_shorts(codes + d, nearest_codes);
  }
  return scale_of(largest, largest_query(head_dim));
}

/* A key or a value, or part of one, in 8 bits. */
INLINE void round_part(int8_t codes[LANES], const void *row, int d, int size, float inverse, int format) {
  typedef int8_t loose_bytes __attribute__((vector_size(WIDTH), aligned(1), may_alias));
  lanes x = load_part(row, d, size, format);
  EACH_VEC *(loose_bytes *)(codes + i * WIDTH) = __builtin_convertvector(nearest(x.v[i] * inverse), loose_bytes);
}

#endif
