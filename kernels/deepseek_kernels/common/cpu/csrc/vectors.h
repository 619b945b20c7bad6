// Loads and sums on ATen's portable vectors: AVX2, AVX-512 and NEON by the flags that the file is compiled with.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <cstdint>
#include <cstring>

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
#include <immintrin.h>
#endif

namespace deepseek {

using BFloat16 = c10::BFloat16;
using Half = c10::Half;
using Vec = at::vec::Vectorized<float>;

// An e4m3 code, in memory. `load_pair` gives its value divided by CODE_UNIT; the factor belongs to the scales.
struct Code {
  uint8_t bits;
};
constexpr float CODE_UNIT = 256.0f;

inline float float_of(float value) {
  return value;
}

inline float float_of(BFloat16 value) {
  return value;
}

// As `load_pair`, of which the comment below says how.
inline float float_of(Code code) {
  const uint16_t bits = static_cast<uint16_t>((code.bits & 0x80) << 8 | (code.bits & 0x7F) << 7);
  return c10::detail::fp16_ieee_to_fp32_value(static_cast<uint16_t>(bits | ((bits + (1 << 7)) & (1 << 14))));
}

constexpr int64_t WIDTH = Vec::size();
constexpr int64_t STEP = 2 * WIDTH; // what `load_pair` reads

inline void load_pair(const float* from, Vec& first, Vec& second) {
  first = Vec::loadu(from);
  second = Vec::loadu(from + WIDTH);
}

inline void load_pair(const BFloat16* from, Vec& first, Vec& second) {
  at::vec::load_fp32_from_bf16(from, first, second);
}

inline void load_pair(const Half* from, Vec& first, Vec& second) {
  at::vec::load_fp32_from_fp16(from, first, second);
}

// The bits s eeee mmm of a code, put at the same places of a float16 (s 0eeee mmm0000000), are the same number but for
// the exponent bias, 15 instead of 7. Subnormals follow the same rule. NaN, all ones, is the one code where adding a
// unit to the last place reaches the free bit of the exponent; set there, it makes a NaN of the float16.
inline void load_pair(const Code* from, Vec& first, Vec& second) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m512i top = _mm512_set1_epi16(1 << 14);
  __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  wide = _mm512_andnot_si512(top, _mm512_slli_epi16(wide, 7));
  const __m512i carried = _mm512_add_epi16(wide, _mm512_set1_epi16(1 << 7));
  wide = _mm512_ternarylogic_epi32(wide, carried, top, 0xF8); // wide | (carried & top)
  first = _mm512_cvtph_ps(_mm512_castsi512_si256(wide));
  second = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(wide, 1));
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256i top = _mm256_set1_epi16(1 << 14);
  __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  wide = _mm256_andnot_si256(top, _mm256_slli_epi16(wide, 7));
  const __m256i carried = _mm256_add_epi16(wide, _mm256_set1_epi16(1 << 7));
  wide = _mm256_or_si256(wide, _mm256_and_si256(carried, top));
  first = _mm256_cvtph_ps(_mm256_castsi256_si128(wide));
  second = _mm256_cvtph_ps(_mm256_extracti128_si256(wide, 1));
#else
  alignas(64) uint16_t halves[STEP];
  for (int64_t i = 0; i < STEP; ++i) {
    const uint16_t code = from[i].bits;
    uint16_t bits = static_cast<uint16_t>((code & 0x80) << 8 | (code & 0x7F) << 7);
    halves[i] = bits | ((bits + (1 << 7)) & (1 << 14));
  }
  load_pair(reinterpret_cast<const Half*>(halves), first, second);
#endif
}

inline float lane_sum(const Vec& x) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_reduce_add_ps(x);
#else
  alignas(64) float lanes[WIDTH];
  x.store(lanes);
  for (int64_t half = WIDTH / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i)
      lanes[i] += lanes[i + half];
  return lanes[0];
#endif
}

inline void prefetch(const void* at) {
  __builtin_prefetch(at, 0, 3);
}

} // namespace deepseek
