// Products of bfloat16 on the instructions of AVX512-BF16, which a CPU with AVX-512 may lack: chosen when run.
//
// They add the products of two neighbours to each float32 accumulator, and treat subnormal numbers as zeros.
#pragma once

#include "rows.h"
#include "vectors.h"

namespace deepseek {

// AVX512-VBMI: every CPU with AVX512-BF16 but Cooper Lake has it.
#define BFLOAT16_CODE __attribute__((target("avx512bf16,avx512vbmi")))

inline bool native_supported() {
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
}

inline bool native_now = native_supported();

inline bool native_enabled() {
  return native_now;
}

inline void enable_native(bool wanted) {
  native_now = wanted && native_supported();
}

constexpr int64_t HALVES = 32; // bfloat16 values of a vector

// M rows of activations times one row of a weight. Up to STREAM_ROWS of them are bound by memory, which is read fastest in
// one stream that is prefetched by hand, AHEAD bytes before it is needed, by loads under a mask: for plain ones a CPU
// also prefetches by itself, and stops at each page (Zen 5, 4 KiB pages: 24 to 30 GB/s by plain loads, 34 to 38 so).
constexpr int STREAM_ROWS = 5;
constexpr int64_t AHEAD = 8192;
// Several rows of activations are read once for each row of the weight: from a first-level cache if they leave room there.
constexpr int64_t STREAM_BYTES = 32 * 1024;

// A mask of ones that the compiler does not know: it would make plain loads of those under a mask that it knows.
template <class Mask>
BFLOAT16_CODE inline Mask whole() {
  Mask mask = ~Mask(0);
  asm("" : "+k"(mask));
  return mask;
}

template <int M>
BFLOAT16_CODE void native_stream(
    const BFloat16* x, int64_t x_stride, const BFloat16* w, int64_t columns, float* out, int64_t stride) {
  __m512 sums[M];
  for (int m = 0; m < M; ++m)
    sums[m] = _mm512_setzero_ps();
  const auto add = [&](__mmask32 present, int64_t k) BFLOAT16_CODE {
    const __m512bh row = (__m512bh)_mm512_maskz_loadu_epi16(present, w + k);
    for (int m = 0; m < M; ++m)
      sums[m] = _mm512_dpbf16_ps(sums[m], row, (__m512bh)_mm512_loadu_si512(x + m * x_stride + k));
  };
  const __mmask32 all = whole<__mmask32>();
  int64_t k = 0;
  for (; k + HALVES <= columns; k += HALVES) {
    prefetch(reinterpret_cast<const char*>(w + k) + AHEAD);
    add(all, k);
  }
  if (k < columns)
    add((__mmask32(1) << (columns - k)) - 1, k);
  // Unrolled early: a loop that is still one would be vectorized, with all sums in memory in every turn of that above.
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
    out[m * stride] = _mm512_reduce_add_ps(sums[m]);
}

template <int M, int N>
BFLOAT16_CODE void native_block(
    const BFloat16* x, int64_t x_stride, const BFloat16* w, int64_t columns, float* out, int64_t stride) {
  __m512 sums[N][M];
  for (int n = 0; n < N; ++n)
    for (int m = 0; m < M; ++m)
      sums[n][m] = _mm512_setzero_ps();
  for (int64_t k = 0; k < columns; k += HALVES) {
    const int64_t left = columns - k;
    const __mmask32 present = left >= HALVES ? ~__mmask32(0) : (__mmask32(1) << left) - 1;
    __m512bh rows[N];
    for (int n = 0; n < N; ++n) {
      const BFloat16* row = w + n * columns + k;
      prefetch(row + N * columns); // the next block's row, which is not near
      rows[n] = (__m512bh)_mm512_maskz_loadu_epi16(present, row);
    }
    for (int m = 0; m < M; ++m) {
      const __m512bh values = (__m512bh)_mm512_loadu_si512(x + m * x_stride + k);
      for (int n = 0; n < N; ++n)
        sums[n][m] = _mm512_dpbf16_ps(sums[n][m], rows[n], values);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
      out[m * stride + n] = _mm512_reduce_add_ps(sums[n][m]);
}

struct NativeHalves {
  const BFloat16* x;
  int64_t x_stride;
  const BFloat16* w;
  int64_t columns, count;
  float* out;
  int64_t stride;

  template <int M>
  void run() const {
    constexpr int N = 3;
    const bool stream = M == 1 || (M <= STREAM_ROWS && M * columns * int64_t(sizeof(BFloat16)) <= STREAM_BYTES);
    int64_t n = 0;
    for (; !stream && n + N <= count; n += N)
      native_block<M, N>(x, x_stride, w + n * columns, columns, out + n, stride);
    for (; n < count; ++n)
      native_stream<M>(x, x_stride, w + n * columns, columns, out + n, stride);
  }
};

// Both bytes of the bfloat16 number of each code without its sign.
struct CodeTable {
  alignas(64) uint8_t low[128], high[128];
  CodeTable();
};

extern const CodeTable CODE_TABLE;

struct DecodedCodes {
  __m512i first, second; // of eight groups of eight codes the even ones, the odd ones
};

struct CodeRegisters {
  __m512i low[2], high[2];
};

BFLOAT16_CODE inline CodeRegisters code_registers() {
  return {
      {_mm512_load_si512(CODE_TABLE.low), _mm512_load_si512(CODE_TABLE.low + 64)},
      {_mm512_load_si512(CODE_TABLE.high), _mm512_load_si512(CODE_TABLE.high + 64)}};
}

// 64 codes as bfloat16, exactly. The lookup ignores the sign's bit.
BFLOAT16_CODE inline DecodedCodes decode(const CodeRegisters& table, __m512i codes) {
  const __m512i low = _mm512_permutex2var_epi8(table.low[0], codes, table.low[1]);
  __m512i high = _mm512_permutex2var_epi8(table.high[0], codes, table.high[1]);
  high = _mm512_ternarylogic_epi32(high, codes, _mm512_set1_epi8(-128), 0xF8); // high | (codes & sign)
  return {_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)};
}

// As `native_stream`. Each block of columns has sums of its own, which its scale multiplies.
template <int M>
BFLOAT16_CODE void native_code_stream(
    const BFloat16* x,
    int64_t x_stride,
    const Code* w,
    const float* scale,
    int64_t columns,
    int64_t block_columns,
    float* out,
    int64_t stride) {
  const CodeRegisters table = code_registers();
  __m512 totals[M], sums[M];
  for (int m = 0; m < M; ++m)
    totals[m] = _mm512_setzero_ps();
  const auto add = [&](__mmask64 present, int64_t k) BFLOAT16_CODE {
    const DecodedCodes row = decode(table, _mm512_maskz_loadu_epi8(present, w + k));
    for (int m = 0; m < M; ++m) {
      const BFloat16* values = x + m * x_stride + k;
      sums[m] = _mm512_dpbf16_ps(sums[m], (__m512bh)row.first, (__m512bh)_mm512_loadu_si512(values));
      sums[m] = _mm512_dpbf16_ps(sums[m], (__m512bh)row.second, (__m512bh)_mm512_loadu_si512(values + HALVES));
    }
  };
  const __mmask64 all = whole<__mmask64>();
  for (int64_t k = 0; k < columns; ++scale) {
    for (int m = 0; m < M; ++m)
      sums[m] = _mm512_setzero_ps();
    const int64_t end = std::min(k + block_columns, columns);
    for (; k + 64 <= end; k += 64) {
      prefetch(reinterpret_cast<const char*>(w + k) + AHEAD);
      add(all, k);
    }
    if (k < end) {
      add((__mmask64(1) << (end - k)) - 1, k);
      k = end;
    }
    const __m512 factor = _mm512_set1_ps(*scale);
    for (int m = 0; m < M; ++m)
      totals[m] = _mm512_fmadd_ps(sums[m], factor, totals[m]);
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
    out[m * stride] = _mm512_reduce_add_ps(totals[m]);
}

template <int M, int N>
BFLOAT16_CODE void native_code_block(
    const BFloat16* x,
    int64_t x_stride,
    const Code* w,
    const float* scale,
    int64_t columns,
    int64_t block_columns,
    float* out,
    int64_t stride) {
  const CodeRegisters table = code_registers();
  __m512 totals[N][M];
  for (int n = 0; n < N; ++n)
    for (int m = 0; m < M; ++m)
      totals[n][m] = _mm512_setzero_ps();
  for (int64_t k = 0; k < columns; ++scale) {
    __m512 sums[N][M];
    for (int n = 0; n < N; ++n)
      for (int m = 0; m < M; ++m)
        sums[n][m] = _mm512_setzero_ps();
    for (const int64_t end = std::min(k + block_columns, columns); k < end; k += 64) {
      const int64_t left = columns - k;
      const __mmask64 present = left >= 64 ? ~__mmask64(0) : (__mmask64(1) << left) - 1;
      DecodedCodes rows[N];
      for (int n = 0; n < N; ++n) {
        const Code* row = w + n * columns + k;
        prefetch(row + N * columns);
        rows[n] = decode(table, _mm512_maskz_loadu_epi8(present, row));
      }
      for (int m = 0; m < M; ++m) {
        const BFloat16* values = x + m * x_stride + k;
        const __m512bh first = (__m512bh)_mm512_loadu_si512(values);
        const __m512bh second = (__m512bh)_mm512_loadu_si512(values + HALVES);
        for (int n = 0; n < N; ++n) {
          sums[n][m] = _mm512_dpbf16_ps(sums[n][m], (__m512bh)rows[n].first, first);
          sums[n][m] = _mm512_dpbf16_ps(sums[n][m], (__m512bh)rows[n].second, second);
        }
      }
    }
    const __m512 factor = _mm512_set1_ps(*scale);
    for (int n = 0; n < N; ++n)
      for (int m = 0; m < M; ++m)
        totals[n][m] = _mm512_fmadd_ps(sums[n][m], factor, totals[n][m]);
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
      out[m * stride + n] = _mm512_reduce_add_ps(totals[n][m]);
}

struct NativeCodes {
  const BFloat16* x;
  int64_t x_stride;
  const Code* w;
  const float* scale;
  int64_t columns, block_columns, count;
  float* out;
  int64_t stride;

  template <int M>
  void run() const {
    constexpr int N = rows_at_once(2 * M);
    const bool stream = N == 1 || M == 1 || (M <= STREAM_ROWS && M * columns * int64_t(sizeof(BFloat16)) <= STREAM_BYTES);
    int64_t n = 0;
    for (; !stream && n + N <= count; n += N)
      native_code_block<M, N>(x, x_stride, w + n * columns, scale, columns, block_columns, out + n, stride);
    for (; n < count; ++n)
      native_code_stream<M>(x, x_stride, w + n * columns, scale, columns, block_columns, out + n, stride);
  }
};

} // namespace deepseek
