// The experts in one call, from the router's choice to the weighted sum: every chosen expert's weights are read from
// memory once, no other's at all; an expert's results are never in memory as a whole.

#include "products.h"
#include "rows_of_values.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <vector>

namespace deepseek {

namespace {

constexpr int64_t UNIT_ROWS = 64; // rows of a weight: what a thread takes at a time
constexpr int64_t UNIT_TOKENS = 64; // rows of an expert: what it multiplies them by at a time

// The rows of one expert among all choices sorted by expert.
struct Group {
  int64_t expert, first, last;
};

struct Choices {
  std::vector<int64_t> token; // of each sorted row
  std::vector<int64_t> row; // of each choice, in the order of tokens; -1 for one that is served elsewhere
  std::vector<Group> groups;
};

Choices sort_by_expert(const int64_t* ids, int64_t tokens, int64_t top_k, int64_t experts) {
  std::vector<std::vector<int64_t>> chosen(experts);
  for (int64_t choice = 0; choice < tokens * top_k; ++choice) {
    TORCH_CHECK_INDEX(
        ids[choice] >= 0 && ids[choice] <= experts, "expected expert_ids from 0 to ", experts, ", got ", ids[choice]);
    if (ids[choice] < experts)
      chosen[ids[choice]].push_back(choice);
  }
  Choices result;
  result.row.assign(tokens * top_k, -1);
  for (int64_t expert = 0; expert < experts; ++expert) {
    if (chosen[expert].empty())
      continue;
    const int64_t first = result.token.size();
    for (const int64_t choice : chosen[expert]) {
      result.row[choice] = result.token.size();
      result.token.push_back(choice / top_k);
    }
    result.groups.push_back({expert, first, static_cast<int64_t>(result.token.size())});
  }
  return result;
}

// The weights of all experts, one behind the other.
struct Stack {
  Matrix matrix;
  int64_t rows, scales; // of one expert

  Stack(const at::Tensor& weight, const at::Tensor& scale, int64_t parts, int64_t block_rows, int64_t block_columns)
      : matrix{
            weight.scalar_type() == at::kBFloat16  ? Kind::bfloat16
                : weight.scalar_type() == at::kFloat ? Kind::float32
                                                     : Kind::code,
            weight.const_data_ptr(),
            weight.size(2),
            scale.defined() ? scale.const_data_ptr<float>() : nullptr,
            std::max<int64_t>(1, weight.size(1) / parts),
            block_rows,
            block_columns},
        rows(weight.size(1)),
        scales(parts * matrix.blocks_down() * matrix.blocks_across()) {}

  Matrix expert(int64_t number) const {
    Matrix one = matrix;
    one.data = static_cast<const char*>(matrix.data) + number * rows * matrix.row_bytes();
    if (one.scale)
      one.scale += number * scales;
    return one;
  }
};

// gate -> gate / (1 + exp(-gate)) * up
void swiglu(float* gate, const float* up, int64_t count) {
  const auto apply = [](const Vec& a, const Vec& b) { return a / (Vec(1.0f) + a.neg().exp()) * b; };
  int64_t k = 0;
  for (; k + WIDTH <= count; k += WIDTH)
    apply(Vec::loadu(gate + k), Vec::loadu(up + k)).store(gate + k);
  if (k < count)
    apply(Vec::loadu(gate + k, count - k), Vec::loadu(up + k, count - k)).store(gate + k, count - k);
}

int64_t chunks(int64_t rows) {
  return (rows + UNIT_ROWS - 1) / UNIT_ROWS;
}

// hidden = silu(x @ gate.T) * (x @ up.T), rounded once.
void first_product(const Activations& x, const Stack& gate_up, const Choices& choices, Activations& hidden) {
  const int64_t width = gate_up.rows / 2, each = chunks(width), all = each * choices.groups.size();
  const int64_t grain = std::max<int64_t>(1, rows_for_a_thread(gate_up.matrix) / (2 * UNIT_ROWS));
  at::parallel_for(0, all, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> gate(UNIT_TOKENS * UNIT_ROWS), up(UNIT_TOKENS * UNIT_ROWS);
    for (int64_t unit = begin; unit < end; ++unit) {
      const Group& group = choices.groups[unit / each];
      const Matrix weight = gate_up.expert(group.expert);
      const int64_t first = unit % each * UNIT_ROWS, last = std::min(first + UNIT_ROWS, width);
      for (int64_t row = group.first; row < group.last; row += UNIT_TOKENS) {
        const int64_t count = std::min(UNIT_TOKENS, group.last - row);
        multiply_many(x, row, count, weight, first, last, gate.data(), UNIT_ROWS);
        multiply_many(x, row, count, weight, width + first, width + last, up.data(), UNIT_ROWS);
        for (int64_t m = 0; m < count; ++m) {
          swiglu(gate.data() + m * UNIT_ROWS, up.data() + m * UNIT_ROWS, last - first);
          hidden.store(row + m, first, last - first, gate.data() + m * UNIT_ROWS);
        }
      }
    }
  });
}

// The sum over a token's choices, in their order, of hidden @ down.T rounded to the result's dtype, times the weight.
void second_product(
    const Activations& hidden, const Stack& down, const Choices& choices, const float* weights, at::Tensor& out) {
  const int64_t tokens = out.size(0), outputs = out.size(1), top_k = tokens ? choices.row.size() / tokens : 0;
  const int64_t sorted = choices.token.size();
  char* bytes = static_cast<char*>(out.mutable_data_ptr());
  at::parallel_for(0, chunks(outputs), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> products(sorted * UNIT_ROWS), total(UNIT_ROWS);
    for (int64_t first = begin * UNIT_ROWS; first < std::min(end * UNIT_ROWS, outputs); first += UNIT_ROWS) {
      const int64_t last = std::min(first + UNIT_ROWS, outputs);
      for (const Group& group : choices.groups) {
        float* to = products.data() + group.first * UNIT_ROWS;
        const int64_t count = group.last - group.first;
        multiply_many(hidden, group.first, count, down.expert(group.expert), first, last, to, UNIT_ROWS);
      }
      round_row(out.scalar_type(), products.data(), sorted * UNIT_ROWS);
      for (int64_t token = 0; token < tokens; ++token) {
        std::fill(total.begin(), total.end(), 0.0f);
        for (int64_t choice = token * top_k; choice < (token + 1) * top_k; ++choice) {
          if (choices.row[choice] < 0)
            continue;
          const float* from = products.data() + choices.row[choice] * UNIT_ROWS;
          for (int64_t k = 0; k < last - first; ++k)
            total[k] += from[k] * weights[choice];
        }
        store_row(
            out.scalar_type(), total.data(), last - first, bytes + (token * outputs + first) * out.element_size());
      }
    }
  });
}

at::Tensor experts(
    const at::Tensor& x,
    const at::Tensor& gate_up,
    const at::Tensor& down,
    const at::Tensor& expert_ids,
    const at::Tensor& weights,
    const std::optional<at::Tensor>& gate_up_scale,
    const std::optional<at::Tensor>& down_scale,
    int64_t block_rows,
    int64_t block_columns) {
  const at::Tensor rows = x.contiguous(), ids = expert_ids.contiguous(), factors = weights.contiguous();
  const at::Tensor first_scale = gate_up_scale ? gate_up_scale->contiguous() : at::Tensor();
  const at::Tensor second_scale = down_scale ? down_scale->contiguous() : at::Tensor();
  const Stack first(gate_up, first_scale, 2, block_rows, block_columns);
  const Stack second(down, second_scale, 1, block_rows, block_columns);
  const Choices choices =
      sort_by_expert(ids.const_data_ptr<int64_t>(), ids.size(0), ids.size(1), gate_up.size(0));
  const int64_t sorted = choices.token.size();
  const bool half = rows.scalar_type() == at::kBFloat16;
  Activations inputs(sorted, half, first.matrix), hidden(sorted, half, second.matrix);
  for (int64_t row = 0; row < sorted; ++row) {
    const int64_t at = choices.token[row] * first.matrix.columns;
    if (half)
      inputs.set_row(row, rows.const_data_ptr<BFloat16>() + at);
    else
      inputs.set_row(row, rows.const_data_ptr<float>() + at);
  }
  at::Tensor out = at::empty({rows.size(0), down.size(1)}, x.options());
  first_product(inputs, first, choices, hidden);
  second_product(hidden, second, choices, factors.const_data_ptr<float>(), out);
  return out;
}

} // namespace

TORCH_LIBRARY_IMPL(deepseek_kernels_cpu, CPU, library) {
  library.impl("experts", &experts);
}

} // namespace deepseek
