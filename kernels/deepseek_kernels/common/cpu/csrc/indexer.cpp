// Scores of the lightning indexer: products of a block of queries, all heads of each, with tiles of keys.

#include "prompt_call.h"
#include "prompt_packing.h"
#include "products.h"
#include "visible.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>

namespace deepseek::prompt {

namespace {

constexpr int64_t BLOCK_QUERIES = 32; // for which a tile of keys is packed once

struct Indexer {
  int64_t batch, queries, keys, heads, width;
  bool narrow, packed;
  at::Tensor q, k, weights;

  int64_t units() const {
    return narrow ? (width + 1) / 2 : width;
  }
};

// Codes, exactly, as bfloat16 or float32.
template <bool NARROW>
void copy_codes(const uint8_t* codes, int64_t count, Unit* row, std::vector<float>& room) {
  float* to = reinterpret_cast<float*>(row);
  if constexpr (NARROW) {
    room.resize(count);
    to = room.data();
  }
  const Code* from = reinterpret_cast<const Code*>(codes);
  int64_t k = 0;
  for (; k < count; k += STEP) {
    Code rest[STEP] = {};
    alignas(64) float values[STEP];
    std::memcpy(rest, from + k, std::min(STEP, count - k));
    Vec first, second;
    load_pair(rest, first, second);
    store_pair(values, first * Vec(CODE_UNIT), second * Vec(CODE_UNIT));
    std::copy_n(values, std::min(STEP, count - k), to + k);
  }
  if constexpr (NARROW)
    convert_row(room.data(), count, reinterpret_cast<BFloat16*>(row));
}

template <bool NARROW>
void copy_row(const Indexer& call, const void* from, Unit* row, std::vector<float>& room) {
  row[call.units() - 1] = 0;
  if (call.packed)
    copy_codes<NARROW>(static_cast<const uint8_t*>(from), call.width, row, room);
  else
    copy_values<NARROW>(call.q.scalar_type(), from, call.width, row, 0);
}

// The sum over heads of weight * ReLU(product) for a tile of keys, products [heads, LANES].
void add_heads(const float* products, const float* weights, int64_t heads, float* out) {
  const Vec zero(0.0f);
  for (int64_t lane = 0; lane < LANES; lane += WIDTH) {
    Vec sum(0.0f);
    for (int64_t head = 0; head < heads; ++head)
      sum = at::vec::fmadd(
          Vec(weights[head]), at::vec::clamp_min(Vec::loadu(products + head * LANES + lane), zero), sum);
    sum.store(out + lane);
  }
}

template <bool NARROW>
void score_block(const Indexer& call, const VisibleKeys& visible, int64_t b, int64_t first, int64_t last, float* out) {
  const int64_t units = call.units(), queries = last - first, size = call.q.element_size();
  Buffer<Unit> q(queries * call.heads * units), rows(LANES * units), keys(LANES * units);
  Buffer<float> products(call.heads * LANES);
  std::vector<float> room;
  const char* q_bytes = static_cast<const char*>(call.q.const_data_ptr());
  const char* k_bytes = static_cast<const char*>(call.k.const_data_ptr());
  int64_t begin = call.keys, end = 0;
  std::vector<SeenKeys> seen;
  for (int64_t query = first; query < last; ++query) {
    seen.push_back(visible.of(b, query));
    begin = std::min(begin, seen.back().first);
    end = std::max(end, seen.back().last);
    for (int64_t head = 0; head < call.heads; ++head) {
      const int64_t at = ((b * call.queries + query) * call.heads + head) * call.width;
      copy_row<NARROW>(call, q_bytes + at * size, q.get() + ((query - first) * call.heads + head) * units, room);
    }
    std::fill_n(out + (b * call.queries + query) * call.keys, call.keys, HIDDEN);
  }
  for (int64_t key = begin; key < end; key += LANES) {
    const int64_t count = std::min(LANES, end - key);
    float scales[LANES];
    for (int64_t i = 0; i < count; ++i) {
      const char* from =
          k_bytes + (b * call.k.stride(0) + (key + i) * call.k.stride(1)) * call.k.element_size();
      copy_row<NARROW>(call, from, rows.get() + i * units, room);
      if (call.packed)
        std::memcpy(scales + i, from + call.width, sizeof(float));
    }
    put_in_lanes(rows.get(), count, units, keys.get());
    for (int64_t query = first; query < last; ++query) {
      const SeenKeys& sight = seen[query - first];
      if (sight.last <= key || sight.first >= key + count)
        continue;
      const Unit* own = q.get() + (query - first) * call.heads * units;
      multiply<NARROW>({own, units, 1, keys.get(), LANES, units, products.get(), LANES}, call.heads, LANES);
      const int64_t row = b * call.queries + query;
      alignas(64) float scores[LANES];
      add_heads(products.get(), call.weights.const_data_ptr<float>() + row * call.heads, call.heads, scores);
      for (int64_t i = 0; i < count; ++i)
        if (sight.at(key + i))
          out[row * call.keys + key + i] = call.packed ? scores[i] * scales[i] : scores[i];
    }
  }
}

at::Tensor indexer_scores(
    const at::Tensor& q, const at::Tensor& keys, const at::Tensor& weights, const std::optional<at::Tensor>& mask) {
  const bool packed = keys.scalar_type() == at::kByte;
  const Indexer call{
      q.size(0),
      q.size(1),
      keys.size(1),
      q.size(2),
      q.size(3),
      native() && (packed || q.scalar_type() == at::kBFloat16),
      packed,
      q.contiguous(),
      keys.stride(2) == 1 ? keys : keys.contiguous(),
      weights.contiguous()};
  const VisibleKeys visible(mask, call.queries, call.keys);
  at::Tensor out = at::empty({call.batch, call.queries, call.keys}, weights.options());
  float* to = out.mutable_data_ptr<float>();
  const int64_t blocks = (call.queries + BLOCK_QUERIES - 1) / BLOCK_QUERIES;
  at::parallel_for(0, call.batch * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / blocks, first = item % blocks * BLOCK_QUERIES;
      const int64_t last = std::min(first + BLOCK_QUERIES, call.queries);
      if (call.narrow)
        score_block<true>(call, visible, b, first, last, to);
      else
        score_block<false>(call, visible, b, first, last, to);
    }
  });
  return out;
}

} // namespace

TORCH_LIBRARY_IMPL(deepseek_kernels_cpu, CPU, library) {
  library.impl("indexer_scores", &indexer_scores);
}

} // namespace deepseek::prompt
