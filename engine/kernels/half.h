/* Formats of numbers, and those of 16 bits: bfloat16, and IEEE half precision, which keeps three bits more of a number and
 * less of its range.
 *
 * Rounding is to the nearest, ties to even. What half precision has no room for becomes its largest number, not infinity;
 * infinities too, and a nan stays one.
 */
#ifndef PROMPTMILL_HALF_H
#define PROMPTMILL_HALF_H

#include <stdint.h>
#include <string.h>
#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

/* Formats of elements in memory. */
#define F32 0
#define BF16 1
#define F16 2
#define I8 3 /* codes, whose scale lies elsewhere */

#define F16_LARGEST 65504.0f

static inline int size_of(int format) { return format == F32 ? 4 : format == I8 ? 1 : 2; }

static inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

static inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

static inline uint16_t to_bf16(float x) {
  uint32_t bits = bits_of(x);
  return x != x ? 0x7FC0 : (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

static inline float from_bf16(uint16_t x) { return float_of((uint32_t)x << 16); }

static inline uint16_t to_f16(float x) {
  x = x > F16_LARGEST ? F16_LARGEST : x < -F16_LARGEST ? -F16_LARGEST : x;
#if defined(__F16C__)
  return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
  __fp16 half = x;
  uint16_t bits;
  memcpy(&bits, &half, 2);
  return bits;
#else
  uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, size = bits & 0x7FFFFFFF;
  if (x != x) return (uint16_t)(sign | 0x7E00);
  if (size < 0x38800000u) /* below 2^-14: adding one half rounds to a whole number of 2^-24 */
    return (uint16_t)(sign | (bits_of(float_of(size) + 0.5f) - bits_of(0.5f)));
  return (uint16_t)(sign | (size + 0xFFF + (size >> 13 & 1) - 0x38000000u) >> 13);
#endif
}

static inline float from_f16(uint16_t x) {
#if defined(__aarch64__)
  __fp16 half;
  memcpy(&half, &x, 2);
  return half;
#else
  uint32_t size = (uint32_t)(x & 0x7FFF) << 13;
  uint32_t odd = size >= 0x0F800000u ? 0x7F800000u : 0; /* infinity or nan */
  return float_of(bits_of(float_of(size) * 0x1p112f) | odd | (uint32_t)(x & 0x8000) << 16);
#endif
}

#endif
