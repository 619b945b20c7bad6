// The operators that attend with many queries.

#include "prompt_call.h"
#include "products.h"
#include "visible.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

namespace deepseek::prompt {

namespace {

using Mask = std::optional<at::Tensor>;

at::Tensor without_gaps(const at::Tensor& x) {
  return x.size(-1) <= 1 || x.stride(-1) == 1 ? x : x.contiguous();
}

Strided strided(const at::Tensor& x, int64_t head_stride, int64_t first = 0) {
  const int64_t size = x.element_size();
  const char* data = static_cast<const char*>(x.const_data_ptr());
  return {data + first * size, x.stride(0) * size, x.stride(1) * size, head_stride * size};
}

// Bits of a mask [batch, queries, keys], one word for the lanes of a group.
void set_bits(Call& call, const at::Tensor& mask) {
  const int64_t groups = call.groups(), stride = mask.stride(2);
  call.bits.assign(call.batch * groups * call.keys, 0);
  const bool* data = mask.const_data_ptr<bool>();
  at::parallel_for(0, call.batch * groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / groups, first = item % groups * LANES;
      uint64_t* bits = call.bits.data() + item * call.keys;
      for (int64_t row = first; row < std::min(first + LANES, call.rows); ++row) {
        const bool* seen = data + b * mask.stride(0) + row / call.repeat * mask.stride(1);
        for (int64_t key = 0; key < call.keys; ++key)
          bits[key] |= static_cast<uint64_t>(seen[key * stride]) << (row - first);
      }
    }
  });
}

// Where the keys that a mask [batch, queries, keys] lets each query see begin and end.
void set_ends(Call& call, const at::Tensor& mask) {
  const int64_t queries = mask.size(1);
  const bool* data = mask.const_data_ptr<bool>();
  at::parallel_for(0, call.batch * queries, 16, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const bool* own = data + item / queries * mask.stride(0) + item % queries * mask.stride(1);
      std::tie(call.first[item], call.last[item]) = ends_of(own, mask.stride(2), call.keys);
    }
  });
}

// Which keys each row sees: all up to its own place, or what spans or a mask [batch, queries, keys] say.
void set_visible(Call& call, const Mask& mask) {
  const int64_t queries = call.rows / call.repeat;
  const auto within = [&](int64_t at) { return static_cast<int32_t>(std::clamp<int64_t>(at, 0, call.keys)); };
  call.first.assign(call.batch * queries, 0);
  call.last.assign(call.batch * queries, within(call.keys));
  if (mask && mask->scalar_type() == at::kBool) {
    set_ends(call, *mask);
    return set_bits(call, *mask);
  }
  const at::Tensor spans = mask ? mask->contiguous() : at::Tensor();
  for (int64_t at = 0; at < call.batch * queries; ++at) {
    if (mask)
      call.first[at] = within(spans.const_data_ptr<int32_t>()[2 * at]);
    call.last[at] = within(mask ? spans.const_data_ptr<int32_t>()[2 * at + 1] : call.keys - queries + at % queries + 1);
  }
}

Call call_of(const at::Tensor& q, const at::Tensor& kv, const at::Tensor& key, const Mask& mask, double scale) {
  Call call{q.size(0), q.size(1), kv.size(1), q.size(2)};
  call.shared = key.size(2);
  call.own = q.size(3) - call.shared;
  call.values = kv.size(3) - call.own;
  call.dtype = call.key_dtype = q.scalar_type();
  call.q = strided(q, q.stride(2));
  call.k = strided(kv, kv.stride(2));
  call.v = strided(kv, kv.stride(2), call.own);
  call.common = strided(key, 0);
  call.scale = static_cast<float>(scale);
  call.narrow = native() && q.scalar_type() == at::kBFloat16;
  set_visible(call, mask);
  return call;
}

std::tuple<at::Tensor, at::Tensor> mla_attention(
    const at::Tensor& q, const at::Tensor& kv, const at::Tensor& key, const Mask& mask, double scale) {
  const at::Tensor a = without_gaps(q), b = without_gaps(kv), c = without_gaps(key);
  const Call call = call_of(a, b, c, mask, scale);
  at::Tensor out = at::empty({call.batch, call.rows, call.heads, call.values}, q.options());
  at::Tensor log_sum = at::empty({call.batch, call.heads, call.rows}, q.options().dtype(at::kFloat));
  attend(call, static_cast<char*>(out.mutable_data_ptr()), log_sum.mutable_data_ptr<float>());
  return {out, log_sum};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> mla_attention_backward(
    const at::Tensor& grad,
    const at::Tensor& q,
    const at::Tensor& kv,
    const at::Tensor& key,
    const Mask& mask,
    const at::Tensor& out,
    const at::Tensor& log_sum,
    double scale) {
  const at::Tensor a = without_gaps(q), b = without_gaps(kv), c = without_gaps(key), d = without_gaps(grad);
  const Call call = call_of(a, b, c, mask, scale);
  at::Tensor q_grad = at::empty(q.sizes(), q.options()), kv_grad = at::empty(kv.sizes(), kv.options());
  at::Tensor common = at::zeros(key.sizes(), key.options().dtype(at::kFloat));
  const Gradients to{
      strided(d, d.stride(2)),
      strided(out, out.stride(2)),
      log_sum.const_data_ptr<float>(),
      static_cast<char*>(q_grad.mutable_data_ptr()),
      static_cast<char*>(kv_grad.mutable_data_ptr()),
      common.mutable_data_ptr<float>()};
  differentiate(call, to);
  return {q_grad, kv_grad, common.to(key.scalar_type())};
}

// Latents [batch, keys, latent + rotated], or packed: keys whose first features are the values, of all heads.
Call call_on_latents(const at::Tensor& q, const at::Tensor& states, int64_t latent, double scale) {
  Call call{q.size(0), q.size(1), states.size(1), q.size(2)};
  call.own = q.size(3);
  call.values = latent;
  call.dtype = q.scalar_type();
  call.key_dtype = states.scalar_type();
  call.q = strided(q, q.stride(2));
  call.k = strided(states, 0);
  call.scale = static_cast<float>(scale);
  call.narrow = native() && q.scalar_type() == at::kBFloat16;
  return call;
}

// Rows are pairs of a query and a head, for which a tile of keys is packed once.
at::Tensor mla_prefill(
    const at::Tensor& q, const at::Tensor& states, int64_t kv_lora_rank, double scale, const Mask& mask) {
  const int64_t heads = q.size(2);
  const at::Tensor rows = q.contiguous().view({q.size(0), q.size(1) * heads, 1, q.size(3)});
  Call call = call_on_latents(rows, states, kv_lora_rank, scale);
  call.repeat = heads;
  set_visible(call, mask);
  at::Tensor out = at::empty({q.size(0), q.size(1), heads, kv_lora_rank}, q.options());
  attend(call, static_cast<char*>(out.mutable_data_ptr()), nullptr);
  return out;
}

// Rows are the heads of a query, each query a row of the batch with keys of its own.
at::Tensor sparse_mla(
    const at::Tensor& q, const at::Tensor& states, const at::Tensor& ids, int64_t kv_lora_rank, double scale) {
  const int64_t batch = q.size(0), queries = q.size(1), heads = q.size(2), chosen = ids.size(2);
  const at::Tensor places = ids.contiguous();
  at::Tensor out = at::empty({batch, queries, heads, kv_lora_rank}, q.options());
  for (int64_t b = 0; b < batch; ++b) {
    const at::Tensor rows = q[b].contiguous().view({queries, heads, 1, q.size(3)});
    Call call = call_on_latents(rows, states[b].expand({queries, -1, -1}), kv_lora_rank, scale);
    call.keys = chosen;
    call.repeat = heads;
    call.ids = places.const_data_ptr<int32_t>() + b * queries * chosen;
    call.first.assign(queries, 0);
    call.last.resize(queries);
    for (int64_t query = 0; query < queries; ++query) {
      const int32_t* own = call.ids + query * chosen;
      // -1 stands behind the last one.
      call.last[query] = static_cast<int32_t>(std::find_if(own, own + chosen, [](int32_t id) { return id < 0; }) - own);
    }
    attend(call, static_cast<char*>(out.mutable_data_ptr()) + b * out.stride(0) * out.element_size(), nullptr);
  }
  return out;
}

} // namespace

TORCH_LIBRARY_IMPL(deepseek_kernels_cpu, CPU, library) {
  library.impl("mla_attention", &mla_attention);
  library.impl("mla_attention_backward", &mla_attention_backward);
  library.impl("mla_prefill", &mla_prefill);
  library.impl("sparse_mla", &sparse_mla);
}

// A second derivative raises, where an operator without any of this would have none and say so in a warning.
TORCH_LIBRARY_IMPL(deepseek_kernels_cpu, Autograd, library) {
  library.impl("mla_attention_backward", torch::autograd::autogradNotImplementedFallback());
}

} // namespace deepseek::prompt
