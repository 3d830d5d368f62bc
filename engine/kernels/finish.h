/* The end of an output of a product: its bias is added; then, rounded as `out` is, what it is added to.
 *
 * Included by a kernel that has defined `product_args` with bias, addend, out and out_features, and whose addend and out
 * are contiguous. */
INLINE void finish_lanes(const product_args *a, int row, int column, lanes result, int is_bf16) {
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
  store_part((void *)at(a->out, place, is_bf16), 0, count, result, is_bf16);
}
