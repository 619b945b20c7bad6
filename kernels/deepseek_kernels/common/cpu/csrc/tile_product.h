// Products of tiles for attention of many queries: C [M, N] = A [M, K] B [K, N], columns of B and C in the lanes of
// vectors.
//
// K runs in units of four bytes: a float32 value, or two neighbouring bfloat16 values (AVX512-BF16). A may have any
// strides, since its units are broadcast; B is [units, lanes].
#pragma once

#include "vectors.h"

#include <algorithm>

#if defined(CPU_CAPABILITY_AVX512)
#include "native.h"
#endif

namespace deepseek::prompt {

using Unit = uint32_t;

// What becomes of the values that C has: nothing is left of them, they are added to, or first multiplied by a factor of
// their column.
enum class Keep { nothing, all, shrunk };

struct Product {
  const Unit* a;
  int64_t a_row, a_unit; // strides
  const Unit* b;
  int64_t b_unit;
  int64_t units;
  float* c;
  int64_t c_row;
  Keep keep = Keep::nothing;
  const float* shrink = nullptr; // [lanes]
};

#if defined(CPU_CAPABILITY_AVX2)
constexpr int TILE_VECTORS = 2; // 6 * 2 sums of 16 registers
#else
constexpr int TILE_VECTORS = 4; // 6 * 4 sums of 32 registers
#endif
constexpr int TILE_ROWS = 6;

inline void keep_sum(const Product& p, int64_t row, int64_t lane, const Vec& sum) {
  float* at = p.c + row * p.c_row + lane;
  if (p.keep == Keep::nothing)
    sum.store(at);
  else if (p.keep == Keep::all)
    (Vec::loadu(at) + sum).store(at);
  else
    at::vec::fmadd(Vec::loadu(at), Vec::loadu(p.shrink + lane), sum).store(at);
}

template <int ROWS, int VECTORS>
void wide_tile(const Product& p, int64_t row, int64_t lane) {
  Vec sums[ROWS][VECTORS];
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS; ++v)
      sums[r][v] = Vec(0.0f);
  const float* a = reinterpret_cast<const float*>(p.a) + row * p.a_row;
  const float* b = reinterpret_cast<const float*>(p.b) + lane;
  for (int64_t unit = 0; unit < p.units; ++unit, a += p.a_unit, b += p.b_unit) {
    Vec right[VECTORS];
    for (int v = 0; v < VECTORS; ++v)
      right[v] = Vec::loadu(b + v * WIDTH);
    for (int r = 0; r < ROWS; ++r) {
      const Vec left(a[r * p.a_row]);
      for (int v = 0; v < VECTORS; ++v)
        sums[r][v] = at::vec::fmadd(left, right[v], sums[r][v]);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS; ++v)
      keep_sum(p, row + r, lane + v * WIDTH, sums[r][v]);
}

#if defined(CPU_CAPABILITY_AVX512)
template <int ROWS, int VECTORS>
BFLOAT16_CODE void narrow_tile(const Product& p, int64_t row, int64_t lane) {
  __m512 sums[ROWS][VECTORS];
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS; ++v)
      sums[r][v] = _mm512_setzero_ps();
  const Unit* a = p.a + row * p.a_row;
  const Unit* b = p.b + lane;
  for (int64_t unit = 0; unit < p.units; ++unit, a += p.a_unit, b += p.b_unit) {
    __m512bh right[VECTORS];
    for (int v = 0; v < VECTORS; ++v)
      right[v] = (__m512bh)_mm512_loadu_si512(b + v * WIDTH);
    for (int r = 0; r < ROWS; ++r) {
      const __m512bh left = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[r * p.a_row]));
      for (int v = 0; v < VECTORS; ++v)
        sums[r][v] = _mm512_dpbf16_ps(sums[r][v], left, right[v]);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS; ++v)
      keep_sum(p, row + r, lane + v * WIDTH, sums[r][v]);
}
#endif

template <bool NARROW, int ROWS, int VECTORS>
void tile(const Product& p, int64_t row, int64_t lane) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (NARROW)
    return narrow_tile<ROWS, VECTORS>(p, row, lane);
#endif
  wide_tile<ROWS, VECTORS>(p, row, lane);
}

template <bool NARROW, int VECTORS>
void column_of_tiles(const Product& p, int64_t rows, int64_t lane) {
  int64_t row = 0;
  for (; row + TILE_ROWS <= rows; row += TILE_ROWS)
    tile<NARROW, TILE_ROWS, VECTORS>(p, row, lane);
  switch (rows - row) {
    case 1: return tile<NARROW, 1, VECTORS>(p, row, lane);
    case 2: return tile<NARROW, 2, VECTORS>(p, row, lane);
    case 3: return tile<NARROW, 3, VECTORS>(p, row, lane);
    case 4: return tile<NARROW, 4, VECTORS>(p, row, lane);
    case 5: return tile<NARROW, 5, VECTORS>(p, row, lane);
  }
}

// All of C, `rows` times `lanes`, which is a multiple of WIDTH.
template <bool NARROW>
void multiply(const Product& p, int64_t rows, int64_t lanes) {
  int64_t lane = 0;
  for (; lane + TILE_VECTORS * WIDTH <= lanes; lane += TILE_VECTORS * WIDTH)
    column_of_tiles<NARROW, TILE_VECTORS>(p, rows, lane);
  for (; lane < lanes; lane += WIDTH)
    column_of_tiles<NARROW, 1>(p, rows, lane);
}

} // namespace deepseek::prompt
