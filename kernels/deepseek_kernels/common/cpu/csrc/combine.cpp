// The weighted sum of each token's rows, which lie sorted by expert, and its gradients: no row is copied or widened in
// memory on the way.

#include "rows_of_values.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <vector>

namespace deepseek {

namespace {

int64_t tokens_for_a_thread(int64_t columns) {
  return std::max<int64_t>(1, (1 << 15) / std::max<int64_t>(1, columns));
}

const char* row_of(const at::Tensor& rows, int64_t row) {
  return static_cast<const char*>(rows.const_data_ptr()) + row * rows.size(1) * rows.element_size();
}

void check_rows(const at::Tensor& ids, int64_t rows) {
  const int64_t* values = ids.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < ids.numel(); ++i)
    TORCH_CHECK_INDEX(values[i] >= 0 && values[i] < rows, "expected rows from 0 to ", rows - 1, ", got ", values[i]);
}

// total += values * weight, each rounded by itself
void add_row(float* total, const float* values, float weight, int64_t count) {
  for (int64_t k = 0; k < count; ++k)
    total[k] += values[k] * weight;
}

// out[token] = sum over its choices, in their order, of y[inverse[token, choice]] times the weight, or times one.
at::Tensor combine(const at::Tensor& y, const std::optional<at::Tensor>& weights, const at::Tensor& inverse) {
  const at::Tensor rows = y.contiguous(), ids = inverse.contiguous();
  const at::Tensor factors = weights ? weights->contiguous() : at::Tensor();
  const int64_t tokens = ids.size(0), top_k = ids.size(1), columns = rows.size(1);
  check_rows(ids, rows.size(0));
  at::Tensor out = at::empty({tokens, columns}, y.options());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const int64_t* row = ids.const_data_ptr<int64_t>();
  const float* factor = weights ? factors.const_data_ptr<float>() : nullptr;
  at::parallel_for(0, tokens, tokens_for_a_thread(top_k * columns), [&](int64_t begin, int64_t end) {
    std::vector<float> total(columns), values(columns);
    for (int64_t token = begin; token < end; ++token) {
      std::fill(total.begin(), total.end(), 0.0f);
      for (int64_t choice = token * top_k; choice < (token + 1) * top_k; ++choice) {
        load_row(rows.scalar_type(), row_of(rows, row[choice]), columns, values.data());
        add_row(total.data(), values.data(), factor ? factor[choice] : 1.0f, columns);
      }
      store_row(rows.scalar_type(), total.data(), columns, to + token * columns * out.element_size());
    }
  });
  return out;
}

// The sum of products has four vectors of accumulators, like that of a norm.
float dot(const float* a, const float* b, int64_t count) {
  Vec sums[4] = {Vec(0.0f), Vec(0.0f), Vec(0.0f), Vec(0.0f)};
  int64_t k = 0;
  for (; k + 4 * WIDTH <= count; k += 4 * WIDTH)
    for (int i = 0; i < 4; ++i)
      sums[i] = at::vec::fmadd(Vec::loadu(a + k + i * WIDTH), Vec::loadu(b + k + i * WIDTH), sums[i]);
  float total = lane_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; k < count; ++k)
    total += a[k] * b[k];
  return total;
}

// The gradients of y, sorted as it is, and of the weights [T, K].
std::tuple<at::Tensor, at::Tensor> combine_backward(
    const at::Tensor& grad, const at::Tensor& y, const at::Tensor& weights, const at::Tensor& inverse) {
  const at::Tensor grads = grad.contiguous(), rows = y.contiguous(), ids = inverse.contiguous();
  const at::Tensor factors = weights.contiguous();
  const int64_t tokens = ids.size(0), top_k = ids.size(1), columns = rows.size(1);
  check_rows(ids, rows.size(0));
  at::Tensor grad_y = at::empty(rows.sizes(), rows.options());
  at::Tensor grad_weights = at::empty(ids.sizes(), factors.options());
  char* to = static_cast<char*>(grad_y.mutable_data_ptr());
  float* to_weights = grad_weights.mutable_data_ptr<float>();
  const int64_t* row = ids.const_data_ptr<int64_t>();
  const float* factor = factors.const_data_ptr<float>();
  at::parallel_for(0, tokens, tokens_for_a_thread(top_k * columns), [&](int64_t begin, int64_t end) {
    std::vector<float> own(columns), values(columns);
    for (int64_t token = begin; token < end; ++token) {
      load_row(grads.scalar_type(), row_of(grads, token), columns, own.data());
      for (int64_t choice = token * top_k; choice < (token + 1) * top_k; ++choice) {
        load_row(rows.scalar_type(), row_of(rows, row[choice]), columns, values.data());
        to_weights[choice] = dot(own.data(), values.data(), columns);
        for (int64_t k = 0; k < columns; ++k)
          values[k] = own[k] * factor[choice];
        store_row(rows.scalar_type(), values.data(), columns, to + row[choice] * columns * grad_y.element_size());
      }
    }
  });
  return {grad_y, grad_weights};
}

} // namespace

TORCH_LIBRARY_IMPL(deepseek_kernels_cpu, CPU, library) {
  library.impl("combine", &combine);
  library.impl("combine_backward", &combine_backward);
}

} // namespace deepseek
