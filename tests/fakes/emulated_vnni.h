/* Stands in for AVX-VNNI where the CPU lacks it: the same sums, by AVX2. To be included before a kernel's source. */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

static __m256i emulated_dpbusd(__m256i sum, __m256i unsigned_bytes, __m256i signed_bytes) {
  uint8_t a[32];
  int8_t b[32];
  int32_t c[8];
  memcpy(a, &unsigned_bytes, 32);
  memcpy(b, &signed_bytes, 32);
  memcpy(c, &sum, 32);
  for (int i = 0; i < 32; i++) c[i / 4] += a[i] * b[i];
  memcpy(&sum, c, 32);
  return sum;
}

#define __AVXVNNI__ 1
#define _mm256_dpbusd_avx_epi32 emulated_dpbusd
