// Absorbed attention of few queries on the latent cache. Keys are shared out among threads in parts that depend on
// their number alone, and parts are merged in order, so that results do not depend on the number of threads.

#include "attention_call.h"
#include "attention_tile.h"
#include "products.h"
#include "rows_of_values.h"
#include "visible.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>

namespace deepseek {

namespace {

constexpr int64_t LEAST_PART = 256; // keys
constexpr int64_t MOST_PARTS = 32;

int64_t round_up(int64_t number, int64_t multiple) {
  return (number + multiple - 1) / multiple * multiple;
}

void fill_queries(Call& call, const at::Tensor& q) {
  const Shape& shape = call.shape;
  const int64_t width = shape.width(), size = shape.batch * width * call.padded;
  std::vector<float> row(width);
  if (call.narrow)
    call.narrow_q.assign(size, BFloat16(0.0f));
  else
    call.wide_q.assign(size, 0.0f);
  const char* bytes = static_cast<const char*>(q.const_data_ptr());
  for (int64_t b = 0; b < shape.batch; ++b)
    for (int64_t r = 0; r < shape.rows(); ++r) {
      load_row(q.scalar_type(), bytes + (b * shape.rows() + r) * width * q.element_size(), width, row.data());
      for (int64_t d = 0; d < width; ++d) {
        if (call.narrow)
          call.narrow_q[((b * width / 2 + d / 2) * call.padded + r) * 2 + d % 2] = BFloat16(row[d]);
        else
          call.wide_q[(b * width + d) * call.padded + r] = row[d];
      }
    }
}

// One row from all its parts, in their order; zeros if it has seen nothing.
void merge(const Call& call, int64_t b, int64_t row, float* out) {
  const int64_t latent = call.shape.latent;
  const auto at = [&](int64_t part) { return (b * call.parts + part) * call.padded + row; };
  float top = UNSEEN, total = 0.0f;
  for (int64_t part = 0; part < call.parts; ++part)
    top = std::isnan(call.top[at(part)]) ? call.top[at(part)] : std::max(top, call.top[at(part)]);
  std::fill_n(out, latent, 0.0f);
  if (top == UNSEEN)
    return;
  for (int64_t part = 0; part < call.parts; ++part) {
    const float factor = std::exp(call.top[at(part)] - top);
    const float* from = call.out.data() + at(part) * latent;
    total += factor * call.total[at(part)];
    for (int64_t k = 0; k < latent; ++k)
      out[k] += factor * from[k];
  }
  for (int64_t k = 0; k < latent; ++k)
    out[k] /= total;
}

bool runs_narrow(const Shape& shape, c10::ScalarType q, c10::ScalarType keys) {
  const bool fits = shape.latent % 32 == 0 && shape.rotated % 2 == 0;
  return native() && fits && q == c10::ScalarType::BFloat16 && keys != c10::ScalarType::Float;
}

at::Tensor attend(const at::Tensor& q, int64_t latent, double scale, const Cache& cache, Visible&& visible) {
  Call call{{q.size(0), q.size(1), q.size(2), latent, q.size(3) - latent}, cache, std::move(visible)};
  const Shape& shape = call.shape;
  at::Tensor out = at::empty({shape.batch, shape.queries, shape.heads, latent}, q.options());
  call.scale = static_cast<float>(scale);
  call.narrow = runs_narrow(shape, q.scalar_type(), cache.dtype);
  call.lanes = call.narrow ? 16 : WIDTH;
  call.padded = round_up(std::max<int64_t>(1, shape.rows()), call.lanes);
  call.part = std::max(LEAST_PART, round_up((cache.keys + MOST_PARTS - 1) / MOST_PARTS, TILE));
  call.parts = std::max<int64_t>(1, (cache.keys + call.part - 1) / call.part);
  fill_queries(call, q);
  const int64_t states = shape.batch * call.parts * call.padded;
  call.top.resize(states);
  call.total.resize(states);
  call.out.resize(states * latent);
  at::parallel_for(0, shape.batch * call.parts, 1, [&](int64_t first, int64_t last) {
    Scratch scratch;
    for (int64_t item = first; item < last; ++item)
      attend_part(call, item / call.parts, item % call.parts, scratch);
  });
  char* bytes = static_cast<char*>(out.mutable_data_ptr());
  at::parallel_for(0, shape.batch * shape.rows(), 16, [&](int64_t first, int64_t last) {
    std::vector<float> row(latent);
    for (int64_t item = first; item < last; ++item) {
      merge(call, item / shape.rows(), item % shape.rows(), row.data());
      store_row(q.scalar_type(), row.data(), latent, bytes + item * latent * out.element_size());
    }
  });
  return out;
}

int32_t within(int64_t at, int64_t keys) {
  return static_cast<int32_t>(std::clamp<int64_t>(at, 0, keys));
}

Visible causal(int64_t batch, int64_t queries, const std::vector<int64_t>& lengths, int64_t keys) {
  Visible visible;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t query = 0; query < queries; ++query) {
      visible.first.push_back(0);
      visible.last.push_back(within(lengths[b] - queries + query + 1, keys));
    }
  return visible;
}

// `mask`: [batch, queries, keys], expanded.
Visible masked(const at::Tensor& mask) {
  Visible visible;
  visible.mask = mask.const_data_ptr<bool>();
  visible.batch_stride = mask.stride(0);
  visible.query_stride = mask.stride(1);
  visible.key_stride = mask.stride(2);
  for (int64_t b = 0; b < mask.size(0); ++b)
    for (int64_t query = 0; query < mask.size(1); ++query) {
      const bool* own = visible.mask + b * visible.batch_stride + query * visible.query_stride;
      const auto [first, last] = ends_of(own, visible.key_stride, mask.size(2));
      visible.first.push_back(first);
      visible.last.push_back(last);
    }
  return visible;
}

at::Tensor mla_decode(
    const at::Tensor& q,
    const at::Tensor& states,
    int64_t kv_lora_rank,
    double scale,
    const std::optional<at::Tensor>& mask) {
  const int64_t batch = q.size(0), queries = q.size(1), keys = states.size(1), size = states.element_size();
  const Cache cache{
      static_cast<const char*>(states.const_data_ptr()),
      states.scalar_type(),
      states.stride(0) * size,
      states.stride(1) * size,
      keys};
  const at::Tensor rows = q.contiguous();
  if (!mask) {
    const std::vector<int64_t> lengths(batch, keys);
    return attend(rows, kv_lora_rank, scale, cache, causal(batch, queries, lengths, keys));
  }
  if (mask->scalar_type() == at::kBool)
    return attend(rows, kv_lora_rank, scale, cache, masked(*mask));
  const at::Tensor spans = mask->contiguous();
  const int32_t* span = spans.const_data_ptr<int32_t>();
  Visible visible;
  for (int64_t at = 0; at < batch * queries; ++at) {
    visible.first.push_back(within(span[2 * at], keys));
    visible.last.push_back(within(span[2 * at + 1], keys));
  }
  return attend(rows, kv_lora_rank, scale, cache, std::move(visible));
}

at::Tensor mla_decode_paged(
    const at::Tensor& q,
    const at::Tensor& pages,
    const at::Tensor& block_table,
    const at::Tensor& lengths,
    int64_t kv_lora_rank,
    double scale) {
  const at::Tensor table = block_table.contiguous(), counts = lengths.contiguous();
  const int64_t size = pages.element_size(), page = pages.size(1), keys = table.size(1) * page;
  const Cache cache{
      static_cast<const char*>(pages.const_data_ptr()),
      pages.scalar_type(),
      pages.stride(0) * size,
      pages.stride(1) * size,
      keys,
      table.const_data_ptr<int32_t>(),
      table.size(1),
      page};
  const int32_t* count = counts.const_data_ptr<int32_t>();
  const std::vector<int64_t> each(count, count + q.size(0));
  return attend(q.contiguous(), kv_lora_rank, scale, cache, causal(q.size(0), q.size(1), each, keys));
}

} // namespace

TORCH_LIBRARY_IMPL(deepseek_kernels_cpu, CPU, library) {
  library.impl("mla_decode", &mla_decode);
  library.impl("mla_decode_paged", &mla_decode_paged);
}

} // namespace deepseek
