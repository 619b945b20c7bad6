#include "norm.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <optional>
#include <vector>

namespace deepseek {

namespace {

// The sum has four vectors of float32 accumulators; its order depends on the count alone.
float sum_of_squares(const float* values, int64_t count) {
  Vec sums[4] = {Vec(0.0f), Vec(0.0f), Vec(0.0f), Vec(0.0f)};
  int64_t k = 0;
  for (; k + 4 * WIDTH <= count; k += 4 * WIDTH)
    for (int i = 0; i < 4; ++i) {
      const Vec x = Vec::loadu(values + k + i * WIDTH);
      sums[i] = at::vec::fmadd(x, x, sums[i]);
    }
  float total = lane_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; k < count; ++k)
    total += values[k] * values[k];
  return total;
}

int64_t worth_a_thread(int64_t columns) {
  return std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(1, columns));
}

// Returns the norm of x (+ residual), and the sum (nothing without a residual).
std::tuple<at::Tensor, at::Tensor> rms_norm(
    const at::Tensor& x, const std::optional<at::Tensor>& residual, const at::Tensor& weight, double eps) {
  const int64_t columns = weight.numel(), rows = columns ? x.numel() / columns : 0;
  const at::Tensor from = x.contiguous(), more = residual ? residual->contiguous() : from;
  const auto summed = residual ? c10::promoteTypes(x.scalar_type(), more.scalar_type()) : x.scalar_type();
  const auto result = c10::promoteTypes(summed, weight.scalar_type());
  at::Tensor out = at::empty(x.sizes(), x.options().dtype(result));
  at::Tensor total = residual ? at::empty(x.sizes(), x.options().dtype(summed)) : at::empty({0}, x.options());
  std::vector<float> factors(columns);
  load_row(weight.scalar_type(), weight.contiguous().const_data_ptr(), columns, factors.data());
  const char* from_bytes = static_cast<const char*>(from.const_data_ptr());
  const char* more_bytes = static_cast<const char*>(more.const_data_ptr());
  char* total_bytes = static_cast<char*>(total.mutable_data_ptr());
  char* out_bytes = static_cast<char*>(out.mutable_data_ptr());
  at::parallel_for(0, rows, worth_a_thread(columns), [&](int64_t first, int64_t last) {
    std::vector<float> values(columns), other(residual ? columns : 0);
    for (int64_t row = first; row < last; ++row) {
      const int64_t at = row * columns;
      load_row(from.scalar_type(), from_bytes + at * from.element_size(), columns, values.data());
      if (residual) {
        load_row(more.scalar_type(), more_bytes + at * more.element_size(), columns, other.data());
        for (int64_t k = 0; k < columns; ++k)
          values[k] += other[k];
        char* to = total_bytes + at * total.element_size();
        store_row(summed, values.data(), columns, to);
        round_row(summed, values.data(), columns);
      }
      norm_row(values.data(), factors.data(), columns, static_cast<float>(eps), summed);
      store_row(result, values.data(), columns, out_bytes + at * out.element_size());
    }
  });
  return {out, total};
}

} // namespace

void norm_row(float* values, const float* weight, int64_t count, float eps, c10::ScalarType dtype) {
  const float root = 1.0f / std::sqrt(sum_of_squares(values, count) / static_cast<float>(count) + eps);
  for (int64_t k = 0; k < count; ++k)
    values[k] *= root;
  round_row(dtype, values, count);
  for (int64_t k = 0; k < count; ++k)
    values[k] *= weight[k];
}

TORCH_LIBRARY_IMPL(deepseek_kernels_cpu, CPU, library) {
  library.impl("rms_norm", &rms_norm);
}

} // namespace deepseek
