// Products of few rows with one matrix for each head, [heads, own + values, latent]: of queries along its rows, of latents
// along its columns.

#include "products.h"
#include "rows_of_values.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <optional>
#include <vector>

namespace deepseek {

namespace {

// out[m * columns + k] = sum over i of x[m * count + i] * matrix[i, k] for `first` <= k < `last`, one chain of sums each.
template <class W>
struct AlongRows {
  const float* x;
  int64_t count;
  const W* matrix;
  int64_t columns, first, last;
  float* out;

  template <int M, int PAIRS>
  void block(int64_t k) const {
    Vec sums[M][2 * PAIRS];
    for (int m = 0; m < M; ++m)
      for (int i = 0; i < 2 * PAIRS; ++i)
        sums[m][i] = Vec(0.0f);
    for (int64_t row = 0; row < count; ++row) {
      Vec values[2 * PAIRS];
      for (int i = 0; i < PAIRS; ++i)
        load_pair(matrix + row * columns + k + i * STEP, values[2 * i], values[2 * i + 1]);
      for (int m = 0; m < M; ++m)
        for (int i = 0; i < 2 * PAIRS; ++i)
          sums[m][i] = at::vec::fmadd(Vec(x[m * count + row]), values[i], sums[m][i]);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int i = 0; i < 2 * PAIRS; ++i)
        sums[m][i].store(out + m * columns + k + i * WIDTH);
  }

  template <int M>
  void run() const {
    constexpr int PAIRS = M <= 2 ? 4 : M <= 4 ? 2 : 1;
    int64_t k = first;
    for (; k + PAIRS * STEP <= last; k += PAIRS * STEP)
      block<M, PAIRS>(k);
    for (; k + STEP <= last; k += STEP)
      block<M, 1>(k);
    for (; k < last; ++k)
      for (int m = 0; m < M; ++m) {
        float sum = 0.0f;
        for (int64_t row = 0; row < count; ++row)
          sum = std::fma(x[m * count + row], float_of(matrix[row * columns + k]), sum);
        out[m * columns + k] = sum;
      }
  }
};

// All heads' matrices, one below the other: values, or codes whose blocks need not end where a head does.
Matrix stack_of(const at::Tensor& up, const at::Tensor& scale, int64_t block_rows, int64_t block_columns) {
  const bool codes = scale.defined(), half = up.scalar_type() == at::kBFloat16;
  const Kind kind = codes ? Kind::code : half ? Kind::bfloat16 : Kind::float32;
  const float* scales = codes ? scale.const_data_ptr<float>() : nullptr;
  return {kind, up.const_data_ptr(), up.size(2), scales, up.size(0) * up.size(1), block_rows, block_columns};
}

// sums[m * latent + k] = sum over i of x[m * own + i] * matrix[first + i, k].
template <class W>
void along_rows(const float* x, int64_t rows, int64_t own, const Matrix& matrix, int64_t first, float* sums) {
  const W* weight = static_cast<const W*>(matrix.data) + first * matrix.columns;
  with_rows(rows, AlongRows<W>{x, own, weight, matrix.columns, 0, matrix.columns, sums});
}

// With codes, activations are multiplied by the scales: anew for each block of columns.
template <>
void along_rows<Code>(const float* x, int64_t rows, int64_t own, const Matrix& matrix, int64_t first, float* sums) {
  const Code* weight = static_cast<const Code*>(matrix.data) + first * matrix.columns;
  std::vector<float> scaled(rows * own);
  for (int64_t block = 0; block < matrix.blocks_across(); ++block) {
    for (int64_t i = 0; i < own; ++i) {
      const float factor = matrix.scale[(first + i) / matrix.block_rows * matrix.blocks_across() + block] * CODE_UNIT;
      for (int64_t row = 0; row < rows; ++row)
        scaled[row * own + i] = x[row * own + i] * factor;
    }
    const int64_t from = block * matrix.block_columns, to = std::min(from + matrix.block_columns, matrix.columns);
    with_rows(rows, AlongRows<Code>{scaled.data(), own, weight, matrix.columns, from, to, sums});
  }
}

// Calls `function` with a null pointer of the type of the matrix's values.
template <class Function>
void with_kind(Kind kind, const Function& function) {
  switch (kind) {
    case Kind::float32: return function(static_cast<float*>(nullptr));
    case Kind::bfloat16: return function(static_cast<BFloat16*>(nullptr));
    case Kind::code: return function(static_cast<Code*>(nullptr));
  }
}

at::Tensor queries_to_latents(
    const at::Tensor& q,
    const at::Tensor& up,
    int64_t own,
    const std::optional<at::Tensor>& scale,
    int64_t block_rows,
    int64_t block_columns) {
  const int64_t rows = q.size(0) * q.size(1), heads = q.size(2), width = q.size(3), latent = up.size(2);
  const int64_t rotated = width - own, size = q.element_size();
  const at::Tensor from = q.contiguous();
  at::Tensor out = at::empty({q.size(0), q.size(1), heads, latent + rotated}, q.options());
  const char* bytes = static_cast<const char*>(from.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const at::Tensor scales = scale ? scale->contiguous() : at::Tensor();
  const Matrix matrices = stack_of(up, scales, block_rows, block_columns);
  with_kind(matrices.kind, [&](auto* type) {
    using W = std::remove_pointer_t<decltype(type)>;
    at::parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> x(rows * own), sums(rows * latent);
      for (int64_t head = begin; head < end; ++head) {
        for (int64_t row = 0; row < rows; ++row)
          load_row(q.scalar_type(), bytes + (row * heads + head) * width * size, own, x.data() + row * own);
        along_rows<W>(x.data(), rows, own, matrices, head * up.size(1), sums.data());
        for (int64_t row = 0; row < rows; ++row) {
          char* at = to + (row * heads + head) * (latent + rotated) * size;
          store_row(q.scalar_type(), sums.data() + row * latent, latent, at);
          std::memcpy(at + latent * size, bytes + ((row * heads + head) * width + own) * size, rotated * size);
        }
      }
    });
  });
  return out;
}

at::Tensor latents_to_values(
    const at::Tensor& latents,
    const at::Tensor& up,
    int64_t own,
    const std::optional<at::Tensor>& scale,
    int64_t block_rows,
    int64_t block_columns) {
  const int64_t rows = latents.size(0) * latents.size(1), heads = latents.size(2), latent = up.size(2);
  const int64_t values = up.size(1) - own, size = latents.element_size();
  const at::Tensor from = latents.contiguous();
  const bool half = from.scalar_type() == at::kBFloat16;
  at::Tensor out = at::empty({latents.size(0), latents.size(1), heads, values}, latents.options());
  const char* bytes = static_cast<const char*>(from.const_data_ptr());
  const at::Tensor scales = scale ? scale->contiguous() : at::Tensor();
  const Matrix matrices = stack_of(up, scales, block_rows, block_columns);
  char* to = static_cast<char*>(out.mutable_data_ptr());
  at::parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> sums(rows * values);
    for (int64_t head = begin; head < end; ++head) {
      Activations x(rows, half, matrices);
      for (int64_t row = 0; row < rows; ++row) {
        const char* at = bytes + (row * heads + head) * latent * size;
        if (half)
          x.set_row(row, reinterpret_cast<const BFloat16*>(at));
        else
          x.set_row(row, reinterpret_cast<const float*>(at));
      }
      const int64_t first = head * up.size(1) + own;
      multiply(x, 0, rows, matrices, first, first + values, sums.data(), values);
      for (int64_t row = 0; row < rows; ++row)
        store_row(from.scalar_type(), sums.data() + row * values, values, to + (row * heads + head) * values * size);
    }
  });
  return out;
}

} // namespace

TORCH_LIBRARY_IMPL(deepseek_kernels_cpu, CPU, library) {
  library.impl("queries_to_latents", &queries_to_latents);
  library.impl("latents_to_values", &latents_to_values);
}

} // namespace deepseek
