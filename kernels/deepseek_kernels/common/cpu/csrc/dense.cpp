// Few rows times one weight, in any of its formats.

#include "products.h"
#include "rows_of_values.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

namespace deepseek {

namespace {

constexpr int64_t BAND_ROWS = 120; // rows of a weight whose products are in memory before they are rounded

Activations activations_of(const at::Tensor& x, const Matrix& weight) {
  const at::Tensor rows = x.contiguous();
  Activations result(rows.size(0), rows.scalar_type() == at::kBFloat16, weight);
  for (int64_t row = 0; row < rows.size(0); ++row) {
    if (rows.scalar_type() == at::kBFloat16)
      result.set_row(row, rows.const_data_ptr<BFloat16>() + row * weight.columns);
    else
      result.set_row(row, rows.const_data_ptr<float>() + row * weight.columns);
  }
  return result;
}

at::Tensor product(const at::Tensor& x, const Matrix& weight, int64_t outputs) {
  const int64_t rows = x.size(0), size = x.element_size();
  at::Tensor out = at::empty({rows, outputs}, x.options());
  const Activations activations = activations_of(x, weight);
  char* bytes = static_cast<char*>(out.mutable_data_ptr());
  at::parallel_for(0, outputs, rows_for_a_thread(weight), [&](int64_t begin, int64_t end) {
    std::vector<float> sums(rows * BAND_ROWS);
    for (int64_t first = begin; first < end; first += BAND_ROWS) {
      const int64_t last = std::min(first + BAND_ROWS, end);
      multiply_many(activations, 0, rows, weight, first, last, sums.data(), BAND_ROWS);
      for (int64_t row = 0; row < rows; ++row)
        store_row(x.scalar_type(), sums.data() + row * BAND_ROWS, last - first, bytes + (row * outputs + first) * size);
    }
  });
  return out;
}

at::Tensor dense(const at::Tensor& x, const at::Tensor& weight) {
  const Kind kind = weight.scalar_type() == at::kBFloat16 ? Kind::bfloat16 : Kind::float32;
  return product(x, Matrix{kind, weight.const_data_ptr(), weight.size(1)}, weight.size(0));
}

at::Tensor fp8_weight(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scale, int64_t block_rows, int64_t block_columns) {
  const at::Tensor scales = scale.contiguous();
  const Matrix matrix{
      Kind::code,
      weight.const_data_ptr(),
      weight.size(1),
      scales.const_data_ptr<float>(),
      std::max<int64_t>(1, weight.size(0)),
      block_rows,
      block_columns};
  return product(x, matrix, weight.size(0));
}

} // namespace

TORCH_LIBRARY_IMPL(deepseek_kernels_cpu, CPU, library) {
  library.impl("dense", &dense);
  library.impl("fp8_weight", &fp8_weight);
}

} // namespace deepseek
