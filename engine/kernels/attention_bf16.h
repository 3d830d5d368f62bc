/* Scores and weighted values of bfloat16 queries over bfloat16 pages, by the CPU's own products of pairs.
 *
 * A score is one chain of VDPBF16PS over pairs of dimensions, times the scaling. Weights are rounded to bfloat16, their sum
 * is not. A weighted value is one chain over pairs of keys, the first of which has an even position; where a row sees
 * half of a pair, the other half is zeros. The instruction takes numbers below 2^-126 for zeros.
 *
 * Pages lie as they do for other formats: two of their rows are interleaved as they are read. In the L1 cache tiles of 3
 * rows or more then make 100 to 107 G multiply-adds a second, of 117 that the unit makes (AMD Zen 4, 3.65 GHz); interleaved
 * pages, 75 to 114.
 *
 * Included by attention_rows.h.
 */
#ifndef PROMPTMILL_ATTENTION_BF16_H
#define PROMPTMILL_ATTENTION_BF16_H

/* LANES elements of two rows in turn. */
INLINE __m512bh interleaved(const char *even, const char *odd) {
  static const uint16_t ORDER[2 * LANES] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                            8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  __m512i low = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)even));
  __m512i high = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)odd));
  return (__m512bh)_mm512_permutex2var_epi16(low, _mm512_loadu_si512(ORDER), high);
}

/* acc[row] += the products of a pair of the row with the `wide` times LANES pairs of elements that lie `place` bytes into
 * `even` and `odd`. */
INLINE void add_pairs(__m512 acc[MAX_ROWS][MAX_WIDE], const uint16_t *const *rows, int column, const char *const *even,
                      const char *const *odd, int64_t place, int num_rows, int wide) {
  __m512bh elements[MAX_WIDE];
  UNROLL(4)
  for (int i = 0; i < wide; i++) elements[i] = interleaved(even[i] + place, odd[i] + place);
  UNROLL(6)
  for (int r = 0; r < num_rows; r++) {
    uint32_t pair;
    memcpy(&pair, rows[r] + column, sizeof pair);
    __m512bh factors = (__m512bh)_mm512_set1_epi32((int32_t)pair);
    UNROLL(4)
    for (int i = 0; i < wide; i++) acc[r][i] = _mm512_dpbf16_ps(acc[r][i], factors, elements[i]);
  }
}

/* `score_tile` of queries as they come. */
INLINE void score_pairs(const uint16_t *const *queries, float scaling, const char *const *keys, const char *const *ahead,
                        int64_t offset, int64_t step, int head_dim, float *scores, int num_rows, int wide) {
  __m512 acc[MAX_ROWS][MAX_WIDE];
  const char *even[MAX_WIDE], *odd[MAX_WIDE];
  for (int p = 0; p < wide; p++) even[p] = keys[p] + offset, odd[p] = even[p] + step;
  for (int r = 0; r < num_rows; r++)
    for (int i = 0; i < wide; i++) acc[r][i] = _mm512_setzero_ps();
  int d = 0;
#pragma GCC unroll 1
  for (int p = 0; p < wide; p++) {
    const char *line = ahead ? ahead[p] : NULL;
    for (int end = d + head_dim / wide; d < end; d += 2) {
      for (int i = 0; ahead && i < wide; i++, line += LINE) fetch_ahead(line);
      add_pairs(acc, queries, d, even, odd, d * step, num_rows, wide);
    }
  }
  for (int r = 0; r < num_rows; r++)
    for (int i = 0; i < wide; i++) store(scores + r * STRIDE + i * LANES, (lanes){{(vec)acc[r][i] * scaling}});
}

/* `value_tile` with weights in bfloat16. */
INLINE void value_pairs(float *part, int64_t part_stride, const float *scores, const char *const *values,
                        const char *const *ahead, int64_t offset, int first, int last, int dim, int num_rows, int wide) {
  static const uint16_t ZEROS[MAX_WIDE * LANES];
  int64_t step = part_stride * size_of(BF16), start = (int64_t)dim * LANES * size_of(BF16);
  __m512 acc[MAX_ROWS][MAX_WIDE];
  const uint16_t *weights[MAX_ROWS];
  part += dim * LANES;
  for (int r = 0; r < num_rows; r++) {
    weights[r] = (const uint16_t *)(scores + r * STRIDE);
    for (int i = 0; i < wide; i++) acc[r][i] = (__m512)load_vec(part + r * part_stride, i, F32);
  }
  for (int j = first & ~1; j < last; j += 2) {
    int panel = j / LANES;
    const char *row = values[panel] + offset + start + j % LANES * step;
    const char *line = ahead ? ahead[panel % BLOCK_PANELS] + start + j % LANES * step : NULL;
    const char *even[MAX_WIDE], *odd[MAX_WIDE];
    for (int i = 0; ahead && i < wide * LANES * size_of(BF16); i += LINE) fetch_ahead(line + i), fetch_ahead(line + step + i);
    const char *low = j < first ? (const char *)ZEROS : row, *high = j + 1 < last ? row + step : (const char *)ZEROS;
    UNROLL(4)
    for (int i = 0; i < wide; i++) even[i] = low + i * LANES * size_of(BF16), odd[i] = high + i * LANES * size_of(BF16);
    add_pairs(acc, weights, j, even, odd, 0, num_rows, wide);
  }
  for (int r = 0; r < num_rows; r++)
    for (int i = 0; i < wide; i++) store(part + r * part_stride + i * LANES, (lanes){{(vec)acc[r][i]}});
}

#endif
