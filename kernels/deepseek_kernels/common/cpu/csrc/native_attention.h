// The same on AVX512-BF16: queries, keys and the weights of the softmax are bfloat16, sums are float32.
#pragma once

#include "attention_tile.h"
#include "native.h"

namespace deepseek {

constexpr int64_t NATIVE_ROWS = 16; // lanes of a vector

// Keys in bfloat16; each in one piece, wherever it is. Pointers up to a multiple of 8 behind them lead to zeros.
struct NativeTile {
  const BFloat16* key[TILE + 8];
  int64_t keys;
};

// A neighbouring pair of bfloat16 values, in all lanes.
BFLOAT16_CODE inline __m512bh pair_of(const BFloat16* values) {
  int32_t pair;
  std::memcpy(&pair, values, sizeof pair);
  return (__m512bh)_mm512_set1_epi32(pair);
}

// scores[key, row] for 16 rows; q [width / 2, rows, 2].
BFLOAT16_CODE inline void native_scores(
    const BFloat16* q, int64_t rows, const NativeTile& tile, int64_t width, float* scores) {
  constexpr int KEYS = 8;
  for (int64_t first = 0; first < tile.keys; first += KEYS) {
    const BFloat16* const* keys = tile.key + first;
    __m512 sums[KEYS];
    for (int key = 0; key < KEYS; ++key)
      sums[key] = _mm512_setzero_ps();
    for (int64_t d = 0; d < width; d += 2) {
      const __m512bh query = (__m512bh)_mm512_loadu_si512(q + d * rows);
      for (int key = 0; key < KEYS; ++key)
        sums[key] = _mm512_dpbf16_ps(sums[key], query, pair_of(keys[key] + d));
    }
    for (int key = 0; key < KEYS && first + key < tile.keys; ++key)
      _mm512_storeu_ps(scores + (first + key) * rows, sums[key]);
  }
}

// weights [keys, rows] of 16 rows in float32 -> [keys / 2, 16, 2] in bfloat16; a key that is missing weighs nothing.
BFLOAT16_CODE inline void pair_weights(const float* weights, int64_t rows, int64_t keys, BFloat16* pairs) {
  for (int64_t key = 0; key < keys; key += 2) {
    const __m512 even = _mm512_loadu_ps(weights + key * rows);
    const __m512 odd = key + 1 < keys ? _mm512_loadu_ps(weights + (key + 1) * rows) : _mm512_setzero_ps();
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd));
    _mm512_storeu_si512(pairs + key * NATIVE_ROWS, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
}

// out[row] = out[row] * shrink[row] + weights . keys, for ROWS rows and 32 features from `feature` on.
template <int ROWS>
BFLOAT16_CODE void native_values(
    const BFloat16* pairs, const NativeTile& tile, int64_t feature, const float* shrink, float* out, int64_t latent) {
  __m512 low[ROWS], high[ROWS];
  for (int row = 0; row < ROWS; ++row)
    low[row] = high[row] = _mm512_setzero_ps();
  for (int64_t key = 0; key < tile.keys; key += 2) {
    const __m512i even = _mm512_loadu_si512(tile.key[key] + feature);
    const __m512i odd = _mm512_loadu_si512(tile.key[key + 1] + feature);
    const __m512bh first = (__m512bh)_mm512_unpacklo_epi16(even, odd);
    const __m512bh second = (__m512bh)_mm512_unpackhi_epi16(even, odd);
    for (int row = 0; row < ROWS; ++row) {
      const __m512bh weight = pair_of(pairs + (key / 2 * NATIVE_ROWS + row) * 2);
      low[row] = _mm512_dpbf16_ps(low[row], weight, first);
      high[row] = _mm512_dpbf16_ps(high[row], weight, second);
    }
  }
  // Unpacking has left features 0-3, 8-11, 16-19, 24-27 in the low sums and the others in the high ones.
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  for (int row = 0; row < ROWS; ++row) {
    float* to = out + row * latent + feature;
    const __m512 factor = _mm512_set1_ps(shrink[row]);
    const __m512 a = _mm512_permutex2var_ps(low[row], first, high[row]);
    const __m512 b = _mm512_permutex2var_ps(low[row], second, high[row]);
    _mm512_storeu_ps(to, _mm512_fmadd_ps(_mm512_loadu_ps(to), factor, a));
    _mm512_storeu_ps(to + 16, _mm512_fmadd_ps(_mm512_loadu_ps(to + 16), factor, b));
  }
}

inline void native_values(
    const BFloat16* pairs, int64_t count, const NativeTile& tile, const float* shrink, float* out, int64_t latent) {
  for (int64_t feature = 0; feature < latent; feature += HALVES) {
    int64_t row = 0;
    for (; row + 8 <= count; row += 8)
      native_values<8>(pairs + 2 * row, tile, feature, shrink + row, out + row * latent, latent);
    for (; row < count; ++row)
      native_values<1>(pairs + 2 * row, tile, feature, shrink + row, out + row * latent, latent);
  }
}

} // namespace deepseek
