// Products of many rows of activations with rows of a weight, from tiles of sums in registers.
//
// A tile is a few rows of both, of a block of columns that a first-level cache holds; between two blocks its sums are
// kept in memory. Each sum is added up in the order of `multiply`: a row's result has the same bits there and here.
#pragma once

#include "vectors.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#if defined(CPU_CAPABILITY_AVX512)
#include "native.h"
#endif

namespace deepseek {

#if defined(CPU_CAPABILITY_AVX2)
constexpr int TILE_ROWS = 2, TILE_OUTPUTS = 4; // 8 sums of 16 registers
#else
constexpr int TILE_ROWS = 4, TILE_OUTPUTS = 6; // 24 sums of 32
#endif

// A vector of sums as the compiler knows it: arrays of the class around it would stay in memory.
#if defined(CPU_CAPABILITY_AVX512)
using Lanes = __m512;
#elif defined(CPU_CAPABILITY_AVX2)
using Lanes = __m256;
#else
using Lanes = Vec;
#endif

// Rows of activations times rows of a weight, both from a block's first column on.
template <class T>
struct Tile {
  const T* x;
  int64_t x_stride;
  const T* w;
  int64_t w_stride;
  int64_t columns; // of the block
  bool begins, ends; // the first block, the last one
  float* kept; // the sums between two blocks
  float* out;
  int64_t stride;
};

#if defined(CPU_CAPABILITY_AVX512)
// Adds one half of the lanes of each group of LANES to the other half, in two vectors, and packs the results.
template <int LANES>
inline __m512 fold(__m512 a, __m512 b) {
  if constexpr (LANES == 16)
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0xEE), _mm512_shuffle_f32x4(a, b, 0x44));
  if constexpr (LANES == 8)
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0xDD), _mm512_shuffle_f32x4(a, b, 0x88));
  const __m512d wide_a = _mm512_castps_pd(a), wide_b = _mm512_castps_pd(b);
  if constexpr (LANES == 4)
    return _mm512_castpd_ps(_mm512_unpackhi_pd(wide_a, wide_b)) + _mm512_castpd_ps(_mm512_unpacklo_pd(wide_a, wide_b));
  return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0xDD), _mm512_shuffle_ps(a, b, 0x88));
}
#endif

#if defined(CPU_CAPABILITY_AVX512)
// The sums of four lanes of each of the vectors of one output, rows beyond M as zeros.
template <int M>
inline __attribute__((always_inline)) __m512 quarters(const Lanes* sums) {
  const __m512 zero = _mm512_setzero_ps();
  const __m512 first = fold<16>(sums[0], M > 1 ? (sums[M > 1 ? 1 : 0]) : zero);
  return fold<8>(first, M > 2 ? fold<16>(sums[M > 2 ? 2 : 0], M > 3 ? (sums[M > 3 ? 3 : 0]) : zero) : zero);
}

// Stores up to four outputs of each row of activations, which are side by side.
template <int M>
inline __attribute__((always_inline)) void store_outputs(__m512 rows, __mmask8 present, float* out, int64_t stride) {
  _mm_mask_storeu_ps(out, present, _mm512_castps512_ps128(rows));
  if constexpr (M > 1)
    _mm_mask_storeu_ps(out + stride, present, _mm512_extractf32x4_ps(rows, 1));
  if constexpr (M > 2)
    _mm_mask_storeu_ps(out + 2 * stride, present, _mm512_extractf32x4_ps(rows, 2));
  if constexpr (M > 3)
    _mm_mask_storeu_ps(out + 3 * stride, present, _mm512_extractf32x4_ps(rows, 3));
}
#endif

// Stores the sum of the lanes of each vector, in the order of `lane_sum`.
template <int M, int N>
inline __attribute__((always_inline)) void store_lane_sums(const Lanes (&sums)[N][M], float* out, int64_t stride) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (N == 1) {
    const __m512 pairs = fold<4>(quarters<M>(sums[0]), quarters<M>(sums[0]));
    store_outputs<M>(fold<2>(pairs, pairs), 1, out, stride);
  } else if constexpr (N == 4) {
    const __m512 first = fold<4>(quarters<M>(sums[0]), quarters<M>(sums[1]));
    const __m512 second = fold<4>(quarters<M>(sums[2]), quarters<M>(sums[3]));
    store_outputs<M>(fold<2>(first, second), 15, out, stride);
  } else {
    static_assert(N == 6);
    const __m512 first = fold<4>(quarters<M>(sums[0]), quarters<M>(sums[1]));
    const __m512 second = fold<4>(quarters<M>(sums[2]), quarters<M>(sums[3]));
    const __m512 third = fold<4>(quarters<M>(sums[4]), quarters<M>(sums[5]));
    store_outputs<M>(fold<2>(first, second), 15, out, stride);
    store_outputs<M>(fold<2>(third, third), 3, out + 4, stride);
  }
#else
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
      out[m * stride + n] = lane_sum(Vec(sums[n][m]));
#endif
}

template <int M, int N>
void wide_tile(const Tile<float>& t) {
  Lanes sums[N][M];
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
      sums[n][m] = Lanes(Vec(0.0f));
  if (!t.begins) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m)
        sums[n][m] = Lanes(Vec::loadu(t.kept + (n * M + m) * WIDTH));
  }
  const auto add = [&](const float* w, int64_t w_stride, int64_t at) {
    Lanes rows[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
      rows[n] = Lanes(Vec::loadu(w + n * w_stride));
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vec values = Vec::loadu(t.x + m * t.x_stride + at);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n)
        sums[n][m] = Lanes(at::vec::fmadd(Vec(rows[n]), values, Vec(sums[n][m])));
    }
  };
  int64_t k = 0;
  for (; k + WIDTH <= t.columns; k += WIDTH)
    add(t.w + k, t.w_stride, k);
  if (k < t.columns) {
    float rest[N * WIDTH] = {};
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
      std::memcpy(rest + n * WIDTH, t.w + n * t.w_stride + k, (t.columns - k) * sizeof(float));
    add(rest, WIDTH, k);
  }
  if (t.ends)
    return store_lane_sums(sums, t.out, t.stride);
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
      Vec(sums[n][m]).store(t.kept + (n * M + m) * WIDTH);
}

#if defined(CPU_CAPABILITY_AVX512)
template <int M, int N>
BFLOAT16_CODE void native_tile(const Tile<BFloat16>& t) {
  Lanes sums[N][M];
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
      sums[n][m] = Lanes(Vec(0.0f));
  if (!t.begins) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m)
        sums[n][m] = Lanes(Vec::loadu(t.kept + (n * M + m) * WIDTH));
  }
  int64_t k = 0;
  for (; k + HALVES <= t.columns; k += HALVES) {
    __m512bh rows[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
      rows[n] = (__m512bh)_mm512_loadu_si512(t.w + n * t.w_stride + k);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const __m512bh values = (__m512bh)_mm512_loadu_si512(t.x + m * t.x_stride + k);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n)
        sums[n][m] = _mm512_dpbf16_ps(sums[n][m], rows[n], values);
    }
  }
  if (k < t.columns) {
    const __mmask32 present = (__mmask32(1) << (t.columns - k)) - 1;
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const __m512bh row = (__m512bh)_mm512_maskz_loadu_epi16(present, t.w + n * t.w_stride + k);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m)
        sums[n][m] = _mm512_dpbf16_ps(sums[n][m], row, (__m512bh)_mm512_loadu_si512(t.x + m * t.x_stride + k));
    }
  }
  if (t.ends)
    return store_lane_sums(sums, t.out, t.stride);
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
      Vec(sums[n][m]).store(t.kept + (n * M + m) * WIDTH);
}
#endif

template <class T, int M, int N>
void run_tile(const Tile<T>& t) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, BFloat16>)
    return native_tile<M, N>(t);
#endif
  if constexpr (std::is_same_v<T, float>)
    wide_tile<M, N>(t);
}

template <class T, int N>
void run_rows(int64_t rows, const Tile<T>& t) {
  switch (rows) {
    case 1: return run_tile<T, 1, N>(t);
    case 2: return run_tile<T, 2, N>(t);
    case 3: return run_tile<T, std::min(3, TILE_ROWS), N>(t);
    case 4: return run_tile<T, std::min(4, TILE_ROWS), N>(t);
  }
}

// All rows of activations times `count` rows of a weight, which should be in a second-level cache.
template <class T>
struct ManyRows {
  const T* x;
  int64_t x_stride, rows;
  const T* w;
  int64_t columns, count;
  float* out;
  int64_t stride;

  static constexpr int64_t BLOCK = 4096 / sizeof(T); // columns of which a first-level cache holds a tile

  void run() const {
    const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    std::vector<float> kept(columns > BLOCK ? tiles * TILE_ROWS * TILE_OUTPUTS * WIDTH : 0);
    int64_t n = 0;
    for (; n + TILE_OUTPUTS <= count; n += TILE_OUTPUTS)
      multiply_outputs<TILE_OUTPUTS>(n, tiles, kept.data());
    for (; TILE_OUTPUTS > 4 && n + 4 <= count; n += 4)
      multiply_outputs<4>(n, tiles, kept.data());
    for (; n < count; ++n)
      multiply_outputs<1>(n, tiles, kept.data());
  }

 private:
  template <int N>
  void multiply_outputs(int64_t n, int64_t tiles, float* kept) const {
    for (int64_t k = 0; k < columns; k += BLOCK) {
      const int64_t width = std::min(BLOCK, columns - k);
      for (int64_t tile = 0, row = 0; tile < tiles; ++tile) {
        float* sums = kept + tile * TILE_ROWS * TILE_OUTPUTS * WIDTH;
        const int64_t high = rows / tiles + (tile < rows % tiles);
        run_rows<T, N>(
            high,
            {x + row * x_stride + k,
             x_stride,
             w + n * columns + k,
             columns,
             width,
             k == 0,
             k + width == columns,
             sums,
             out + row * stride + n,
             stride});
        row += high;
      }
    }
  }
};

} // namespace deepseek
