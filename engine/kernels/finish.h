/* The end of an output of a product: its bias is added; then, rounded as x is, what it is added to.
 *
 * Included by a kernel that has defined `product_args` with bias, addend, out and out_features, and whose addend and out
 * are contiguous. widens: whether the numbers of bfloat16 that come out are written as float32. */
INLINE void finish_lanes(const product_args *a, int row, int column, lanes result, int is_bf16, int widens) {
  int left = a->out_features - column, count = left < LANES ? left : LANES;
  int64_t place = (int64_t)row * a->out_features + column;
  if (a->bias) {
    lanes bias = load_part(a->bias, column, a->out_features, 0);
    EACH_VEC result.v[i] += bias.v[i];
  }
  if (a->addend) {
    lanes addend = load_part(at(a->addend, place, is_bf16), 0, count, is_bf16);
    result = rounded(result, is_bf16);
    EACH_VEC result.v[i] += addend.v[i];
  }
  int format = widens ? F32 : is_bf16;
  store_part((void *)at(a->out, place, format), 0, count, widens ? rounded(result, 1) : result, format);
}

#if defined(__AVX512BF16__)
/* Whether the columns from `column` on are those of two whole panels and without a bias, as most are: for `finish_pair`. */
INLINE int is_plain_pair(const product_args *a, int column) { return !a->bias && column + 2 * LANES <= a->out_features; }

INLINE __m512 widened(__m256i halves) { return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16); }

/* `finish_lanes` for two panels in bfloat16, without a bias. */
INLINE void finish_pair(const product_args *a, int row, int column, __m512 low, __m512 high, int widens) {
  int64_t place = (int64_t)row * a->out_features + column;
  __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(high, low);
  if (a->addend) {
    __m512i addend = _mm512_loadu_si512((const uint16_t *)a->addend + place);
    low = widened(_mm512_castsi512_si256(rounded)) + widened(_mm512_castsi512_si256(addend));
    high = widened(_mm512_extracti64x4_epi64(rounded, 1)) + widened(_mm512_extracti64x4_epi64(addend, 1));
    rounded = (__m512i)_mm512_cvtne2ps_pbh(high, low);
  }
  if (widens) {
    float *out = (float *)a->out + place;
    _mm512_storeu_si512(out, (__m512i)widened(_mm512_castsi512_si256(rounded)));
    _mm512_storeu_si512(out + LANES, (__m512i)widened(_mm512_extracti64x4_epi64(rounded, 1)));
    return;
  }
  _mm512_storeu_si512((uint16_t *)a->out + place, rounded);
}
#endif
