#include "products.h"

#include "many_rows.h"

#include <cmath>
#include <new>
#include <vector>

#if defined(CPU_CAPABILITY_AVX512)
#include "native.h"
#endif

namespace deepseek {

namespace {

constexpr int64_t PADDING = 64; // columns: a multiple of what any loop reads at once
constexpr std::align_val_t ALIGNMENT{64};
constexpr int64_t BAND_BYTES = 128 * 1024; // of a weight: what stays in cache for all rows of activations
constexpr int64_t ROWS_BYTES = 256 * 1024; // of activations: what stays in cache for a band of the weight

// ---------------------------------------------------------------- layouts of activations

// Decoding 64 codes leaves them in this order: the groups of eight with even numbers before those with odd ones.
int64_t interleaved(int64_t column) {
  const int64_t group = column % 64 / 8;
  return column / 64 * 64 + group % 2 * 32 + group / 2 * 8 + column % 8;
}

bool reads_interleaved(const Matrix& weight) {
  return weight.kind == Kind::code && weight.block_columns % 64 == 0;
}

} // namespace

bool native() {
#if defined(CPU_CAPABILITY_AVX512)
  return native_enabled();
#else
  return false;
#endif
}

void set_native(bool wanted) {
#if defined(CPU_CAPABILITY_AVX512)
  enable_native(wanted);
#endif
}

void Activations::Free::operator()(char* memory) const {
  ::operator delete(memory, ALIGNMENT);
}

Activations::Activations(int64_t rows, bool half, const Matrix& weight)
    : rows_(rows),
      columns_(weight.columns),
      stride_((weight.columns + PADDING - 1) / PADDING * PADDING),
      half_(half),
      layout_(Layout::wide) {
  if (half && native()) {
    if (weight.kind == Kind::bfloat16)
      layout_ = Layout::narrow;
    else if (reads_interleaved(weight))
      layout_ = Layout::interleaved;
  }
  const size_t size = rows * stride_ * (narrow() ? sizeof(BFloat16) : sizeof(float));
  memory_.reset(static_cast<char*>(::operator new(std::max<size_t>(size, 1), ALIGNMENT)));
  if (columns_ < stride_)
    std::memset(memory_.get(), 0, size);
}

void Activations::set_row(int64_t row, const float* values) {
  std::memcpy(const_cast<float*>(wide_row(row)), values, columns_ * sizeof(float));
}

void Activations::set_row(int64_t row, const BFloat16* values) {
  if (!narrow()) {
    float* to = const_cast<float*>(wide_row(row));
    for (int64_t k = 0; k < columns_; ++k)
      to[k] = values[k];
    return;
  }
  BFloat16* to = const_cast<BFloat16*>(narrow_row(row));
  if (layout_ == Layout::narrow) {
    std::memcpy(to, values, columns_ * sizeof(BFloat16));
    return;
  }
  int64_t k = 0;
  for (; k + 8 <= columns_; k += 8)
    std::memcpy(to + interleaved(k), values + k, 8 * sizeof(BFloat16));
  for (; k < columns_; ++k)
    to[interleaved(k)] = values[k];
}

void Activations::store(int64_t row, int64_t first, int64_t count, const float* values) {
  if (!narrow()) {
    float* to = const_cast<float*>(wide_row(row)) + first;
    for (int64_t k = 0; k < count; ++k)
      to[k] = half_ ? static_cast<float>(BFloat16(values[k])) : values[k];
    return;
  }
  BFloat16* to = const_cast<BFloat16*>(narrow_row(row));
  for (int64_t k = 0; k < count; ++k)
    to[layout_ == Layout::narrow ? first + k : interleaved(first + k)] = BFloat16(values[k]);
}

#if defined(CPU_CAPABILITY_AVX512)
CodeTable::CodeTable() {
  for (int code = 0; code < 128; ++code) {
    // The float16 of the same bits has an exponent bias greater by 8; NaN, all ones, is an exception.
    const float value = code == 127 ? NAN : c10::detail::fp16_ieee_to_fp32_value(code << 7) * CODE_UNIT;
    const uint16_t bits = BFloat16(value).x;
    low[code] = bits & 0xFF;
    high[code] = bits >> 8;
  }
}

const CodeTable CODE_TABLE;
#endif

// ---------------------------------------------------------------- products in float32

namespace {

// Sums of M rows of activations with N rows of the weight.
template <class W, int M, int N>
void wide_block(const float* x, int64_t x_stride, const W* w, int64_t columns, float* out, int64_t stride) {
  Vec sums[N][M];
  for (int n = 0; n < N; ++n)
    for (int m = 0; m < M; ++m)
      sums[n][m] = Vec(0.0f);
  const auto add = [&](const W* rows, int64_t rows_stride, int64_t at) {
    Vec first[N], second[N];
    for (int n = 0; n < N; ++n)
      load_pair(rows + n * rows_stride, first[n], second[n]);
    for (int m = 0; m < M; ++m) {
      const Vec a = Vec::loadu(x + m * x_stride + at), b = Vec::loadu(x + m * x_stride + at + WIDTH);
      for (int n = 0; n < N; ++n)
        sums[n][m] = at::vec::fmadd(second[n], b, at::vec::fmadd(first[n], a, sums[n][m]));
    }
  };
  int64_t k = 0;
  for (; k + STEP <= columns; k += STEP) {
    for (int n = 0; n < N; ++n)
      prefetch(w + (n + N) * columns + k); // the next block's row, which is not near
    add(w + k, columns, k);
  }
  if (k < columns) {
    W rest[N * STEP] = {};
    for (int n = 0; n < N; ++n)
      std::memcpy(rest + n * STEP, w + n * columns + k, (columns - k) * sizeof(W));
    add(rest, STEP, k);
  }
  // Unrolled early: a loop that is still one would be vectorized, with all sums in memory in every turn of that above.
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n)
      out[m * stride + n] = lane_sum(sums[n][m]);
}

template <class W>
struct Wide {
  const float* x;
  int64_t x_stride;
  const W* w;
  int64_t columns, count;
  float* out;
  int64_t stride;

  template <int M>
  void run() const {
    constexpr int N = rows_at_once(M);
    int64_t n = 0;
    for (; n + N <= count; n += N)
      wide_block<W, M, N>(x, x_stride, w + n * columns, columns, out + n, stride);
    for (; n < count; ++n)
      wide_block<W, M, 1>(x, x_stride, w + n * columns, columns, out + n, stride);
  }
};

// ---------------------------------------------------------------- codes

// Consecutive rows of a weight that share a row of scales.
struct Band {
  int64_t first, last;
  const float* scale;
};

Band band_of(const Matrix& weight, int64_t row, int64_t last) {
  const int64_t part = row / weight.part_rows, block = row % weight.part_rows / weight.block_rows;
  const int64_t end = part * weight.part_rows + std::min((block + 1) * weight.block_rows, weight.part_rows);
  return {row, std::min(end, last), weight.scale + (part * weight.blocks_down() + block) * weight.blocks_across()};
}

// The activations of a band times its scales: fewer numbers than the codes.
void scale_rows(const Activations& x, int64_t row, int64_t rows, const Matrix& weight, const float* scale, float* out) {
  for (int64_t m = 0; m < rows; ++m) {
    const float* from = x.wide_row(row + m);
    float* to = out + m * x.stride();
    for (int64_t block = 0, k = 0; k < weight.columns; ++block) {
      const float factor = scale[block] * CODE_UNIT;
      for (const int64_t end = std::min(k + weight.block_columns, weight.columns); k < end; ++k)
        to[k] = from[k] * factor;
    }
  }
}

void multiply_codes(
    const Activations& x,
    int64_t row,
    int64_t rows,
    const Matrix& weight,
    int64_t first,
    int64_t last,
    float* out,
    int64_t stride) {
  std::vector<float> scaled(x.narrow() ? 0 : rows * x.stride());
  for (int64_t n = first; n < last;) {
    const Band band = band_of(weight, n, last);
    const Code* codes = static_cast<const Code*>(weight.data) + band.first * weight.columns;
    const int64_t count = band.last - band.first;
    float* to = out + band.first - first;
#if defined(CPU_CAPABILITY_AVX512)
    if (x.narrow()) {
      const NativeCodes call{
          x.narrow_row(row), x.stride(), codes, band.scale, weight.columns, weight.block_columns, count, to, stride};
      with_rows(rows, call);
      n = band.last;
      continue;
    }
#endif
    scale_rows(x, row, rows, weight, band.scale, scaled.data());
    with_rows(rows, Wide<Code>{scaled.data(), x.stride(), codes, weight.columns, count, to, stride});
    n = band.last;
  }
}

} // namespace

void multiply(
    const Activations& x,
    int64_t row,
    int64_t rows,
    const Matrix& weight,
    int64_t first,
    int64_t last,
    float* out,
    int64_t stride) {
  if (weight.kind == Kind::code)
    return multiply_codes(x, row, rows, weight, first, last, out, stride);
  const int64_t count = last - first, skipped = first * weight.columns;
  if (weight.kind == Kind::float32) {
    const float* w = static_cast<const float*>(weight.data) + skipped;
    return with_rows(rows, Wide<float>{x.wide_row(row), x.stride(), w, weight.columns, count, out, stride});
  }
  const BFloat16* w = static_cast<const BFloat16*>(weight.data) + skipped;
#if defined(CPU_CAPABILITY_AVX512)
  if (x.narrow())
    return with_rows(rows, NativeHalves{x.narrow_row(row), x.stride(), w, weight.columns, count, out, stride});
#endif
  with_rows(rows, Wide<BFloat16>{x.wide_row(row), x.stride(), w, weight.columns, count, out, stride});
}

namespace {

template <class T>
void multiply_tiles(
    const Activations& x,
    int64_t row,
    int64_t rows,
    const Matrix& weight,
    int64_t first,
    int64_t last,
    float* out,
    int64_t stride) {
  int64_t done = 0;
  if constexpr (std::is_same_v<T, BFloat16>) {
    // The loops for few rows read the weight at the memory's speed; tiles then find it in cache.
    done = MOST_ROWS;
    multiply(x, row, done, weight, first, last, out, stride);
  }
  const int64_t each = std::max<int64_t>(1, ROWS_BYTES / (TILE_ROWS * weight.row_bytes())) * TILE_ROWS;
  const T* w = static_cast<const T*>(weight.data) + first * weight.columns;
  for (; done < rows; done += each) {
    const int64_t count = std::min(each, rows - done);
    const T* from;
    if constexpr (std::is_same_v<T, BFloat16>)
      from = x.narrow_row(row + done);
    else
      from = x.wide_row(row + done);
    ManyRows<T>{from, x.stride(), count, w, weight.columns, last - first, out + done * stride, stride}.run();
  }
}

} // namespace

void multiply_many(
    const Activations& x,
    int64_t row,
    int64_t rows,
    const Matrix& weight,
    int64_t first,
    int64_t last,
    float* out,
    int64_t stride) {
  const bool tiles = weight.kind == Kind::float32 || (weight.kind == Kind::bfloat16 && x.narrow());
  if (rows <= MOST_ROWS || !tiles) {
    for (int64_t at = 0; at < rows; at += MOST_ROWS)
      multiply(x, row + at, std::min(MOST_ROWS, rows - at), weight, first, last, out + at * stride, stride);
    return;
  }
  const int64_t band = std::max<int64_t>(1, BAND_BYTES / (TILE_OUTPUTS * weight.row_bytes())) * TILE_OUTPUTS;
  for (int64_t n = first; n < last; n += band) {
    const int64_t end = std::min(n + band, last);
    if (weight.kind == Kind::float32)
      multiply_tiles<float>(x, row, rows, weight, n, end, out + n - first, stride);
    else
      multiply_tiles<BFloat16>(x, row, rows, weight, n, end, out + n - first, stride);
  }
}

} // namespace deepseek
