// The choice of experts: scores are compared as integers of the same order, of equal ones the smaller id is first.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

namespace deepseek {

namespace {

constexpr int32_t TAKEN = std::numeric_limits<int32_t>::min(); // below every score
constexpr int32_t MINUS_INFINITY = TAKEN + 0x7FFFFF;
constexpr int32_t NOT_A_NUMBER = std::numeric_limits<int32_t>::max();

// The order of torch.sort: -0 equals 0, and NaN is larger than anything.
int32_t key_of(float value) {
  if (value != value)
    return NOT_A_NUMBER;
  value += 0.0f;
  int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits < 0 ? bits ^ 0x7FFFFFFF : bits;
}

float value_of(int32_t key) {
  const int32_t bits = key < 0 ? key ^ 0x7FFFFFFF : key;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

struct Routing {
  int64_t experts, top_k, groups, kept, group_best;
  bool normalize;
  float factor;
};

int64_t best(const std::vector<int32_t>& keys) {
  return std::max_element(keys.begin(), keys.end()) - keys.begin(); // the first of equal ones
}

// The keys of all but the kept groups become that of -inf.
void limit_to_groups(std::vector<int32_t>& keys, const Routing& routing, std::vector<int32_t>& scores) {
  const int64_t size = routing.experts / routing.groups;
  for (int64_t group = 0; group < routing.groups; ++group) {
    int32_t first = TAKEN, second = TAKEN;
    for (int64_t expert = group * size; expert < (group + 1) * size; ++expert) {
      second = std::max(second, std::min(first, keys[expert]));
      first = std::max(first, keys[expert]);
    }
    scores[group] = routing.group_best == 1 ? first : key_of(value_of(first) + value_of(second));
  }
  for (int64_t turn = 0; turn < routing.kept; ++turn)
    scores[best(scores)] = TAKEN;
  for (int64_t group = 0; group < routing.groups; ++group)
    if (scores[group] != TAKEN)
      for (int64_t expert = group * size; expert < (group + 1) * size; ++expert)
        keys[expert] = std::min(keys[expert], MINUS_INFINITY);
}

void weigh(const float* scores, const Routing& routing, const int64_t* ids, float* weights) {
  double total = 0.0; // exact, so that its order does not matter
  for (int64_t k = 0; k < routing.top_k; ++k) {
    weights[k] = scores[ids[k]];
    total += weights[k];
  }
  const float divisor = static_cast<float>(total + 1e-20);
  for (int64_t k = 0; k < routing.top_k; ++k)
    weights[k] = (routing.normalize ? weights[k] / divisor : weights[k]) * routing.factor;
}

std::tuple<at::Tensor, at::Tensor> topk_gate(
    const at::Tensor& scores,
    const std::optional<at::Tensor>& bias,
    int64_t top_k,
    at::IntArrayRef groups, // how many, how many are kept, how many of its best experts a group is ranked by
    bool normalize,
    double factor) {
  const int64_t tokens = scores.size(0), experts = scores.size(1);
  const int64_t n_group = groups[0], topk_group = groups[1], group_best = groups[2];
  const Routing routing{experts, top_k, n_group, topk_group, group_best, normalize, static_cast<float>(factor)};
  const at::Tensor rows = scores.contiguous(), shift = bias ? bias->contiguous() : at::Tensor();
  at::Tensor weights = at::empty({tokens, top_k}, scores.options());
  at::Tensor ids = at::empty({tokens, top_k}, scores.options().dtype(at::kLong));
  const float* from = rows.const_data_ptr<float>();
  const float* added = bias ? shift.const_data_ptr<float>() : nullptr;
  float* to = weights.mutable_data_ptr<float>();
  int64_t* chosen = ids.mutable_data_ptr<int64_t>();
  at::parallel_for(0, tokens, 16, [&](int64_t first, int64_t last) {
    std::vector<int32_t> keys(experts), ranks(n_group);
    for (int64_t token = first; token < last; ++token) {
      const float* row = from + token * experts;
      for (int64_t expert = 0; expert < experts; ++expert)
        keys[expert] = key_of(added ? row[expert] + added[expert] : row[expert]);
      if (topk_group < n_group)
        limit_to_groups(keys, routing, ranks);
      for (int64_t k = 0; k < top_k; ++k) {
        const int64_t expert = best(keys);
        chosen[token * top_k + k] = expert;
        keys[expert] = TAKEN;
      }
      weigh(row, routing, chosen + token * top_k, to + token * top_k);
    }
  });
  return {weights, ids};
}

} // namespace

TORCH_LIBRARY_IMPL(deepseek_kernels_cpu, CPU, library) {
  library.impl("topk_gate", &topk_gate);
}

} // namespace deepseek
