// Absorbed attention of all queries of one row of the batch on one part of its keys, tile by tile.

#include "attention_call.h"
#include "attention_tile.h"
#include "packing.h"

#if defined(CPU_CAPABILITY_AVX512)
#include "native_attention.h"
#endif

#include <algorithm>

namespace deepseek {

namespace {

void unpack(const Call& call, int64_t b, int64_t first, int64_t keys, Scratch& scratch, WideTile& tile) {
  const Shape& shape = call.shape;
  const int64_t width = shape.width();
  if (call.cache.dtype == c10::ScalarType::Float && !call.cache.table && call.cache.key_bytes % 4 == 0) {
    tile = {reinterpret_cast<const float*>(call.cache.key(b, first)), call.cache.key_bytes / 4, keys};
    return;
  }
  scratch.wide.resize(TILE * width);
  for (int64_t key = 0; key < keys; ++key) {
    const char* from = call.cache.key(b, first + key);
    float* to = scratch.wide.data() + key * width;
    if (call.cache.dtype == c10::ScalarType::Byte)
      unpack_row(reinterpret_cast<const uint8_t*>(from), shape.latent, shape.rotated, to);
    else
      load_row(call.cache.dtype, from, width, to);
  }
  tile = {scratch.wide.data(), width, keys};
}

// The scores of what a row does not see become -inf.
void hide(const Call& call, int64_t b, int64_t row, int64_t first, int64_t keys, float* scores) {
  const Visible& visible = call.visible;
  for (int64_t lane = 0; lane < call.lanes; ++lane) {
    if (row + lane >= call.shape.rows())
      return; // padding: nobody reads it
    const int64_t query = (row + lane) / call.shape.heads, at = b * call.shape.queries + query;
    const int64_t begin = visible.first[at] - first, end = visible.last[at] - first;
    if (begin <= 0 && end >= keys && !visible.mask)
      continue;
    const bool* mask = visible.mask;
    if (mask)
      mask += b * visible.batch_stride + query * visible.query_stride + first * visible.key_stride;
    for (int64_t key = 0; key < keys; ++key)
      if (key < begin || key >= end || (mask && !mask[key * visible.key_stride]))
        scores[key * call.padded + lane] = UNSEEN;
  }
}

void scale_scores(const Call& call, int64_t keys, float* scores) {
  for (int64_t key = 0; key < keys; ++key)
    for (int64_t lane = 0; lane < call.lanes; lane += WIDTH) {
      float* at = scores + key * call.padded + lane;
      (Vec::loadu(at) * Vec(call.scale)).store(at);
    }
}

void attend_wide(const Call& call, int64_t b, int64_t first, int64_t keys, Scratch& scratch, const Softmax& state) {
  WideTile tile;
  unpack(call, b, first, keys, scratch, tile);
  const float* q = call.wide_q.data() + b * call.shape.width() * call.padded;
  for (int64_t row = 0; row < call.padded; row += call.lanes) {
    float* scores = scratch.scores.data() + row;
    wide_scores(q + row, call.padded, tile, call.shape.width(), scores);
    scale_scores(call, keys, scores);
    hide(call, b, row, first, keys, scores);
    alignas(64) float shrink[WIDTH];
    float* out = state.out + row * call.shape.latent;
    exponentials(scores, call.padded, keys, {state.top + row, state.total + row, out}).store(shrink);
    const int64_t count = std::min(call.lanes, call.shape.rows() - row);
    wide_values(scores, call.padded, count, tile, shrink, out, call.shape.latent);
  }
}

#if defined(CPU_CAPABILITY_AVX512)
void point(const Call& call, int64_t b, int64_t first, int64_t keys, Scratch& scratch, NativeTile& tile) {
  const Shape& shape = call.shape;
  scratch.zeros.assign(shape.width(), BFloat16(0.0f));
  if (call.cache.dtype == c10::ScalarType::Byte)
    scratch.narrow.resize(TILE * shape.width());
  for (int64_t key = 0; key < keys; ++key) {
    const char* from = call.cache.key(b, first + key);
    tile.key[key] = reinterpret_cast<const BFloat16*>(from);
    if (call.cache.dtype == c10::ScalarType::Byte) {
      BFloat16* to = scratch.narrow.data() + key * shape.width();
      unpack_row(reinterpret_cast<const uint8_t*>(from), shape.latent, shape.rotated, to);
      tile.key[key] = to;
    }
  }
  std::fill(tile.key + keys, tile.key + keys + 8, scratch.zeros.data());
  tile.keys = keys;
}

void attend_narrow(const Call& call, int64_t b, int64_t first, int64_t keys, Scratch& scratch, const Softmax& state) {
  NativeTile tile;
  point(call, b, first, keys, scratch, tile);
  scratch.pairs.resize((TILE + 1) * NATIVE_ROWS);
  const BFloat16* q = call.narrow_q.data() + b * call.shape.width() * call.padded;
  for (int64_t row = 0; row < call.padded; row += call.lanes) {
    float* scores = scratch.scores.data() + row;
    native_scores(q + 2 * row, call.padded, tile, call.shape.width(), scores);
    scale_scores(call, keys, scores);
    hide(call, b, row, first, keys, scores);
    alignas(64) float shrink[WIDTH];
    float* out = state.out + row * call.shape.latent;
    exponentials(scores, call.padded, keys, {state.top + row, state.total + row, out}).store(shrink);
    pair_weights(scores, call.padded, keys, scratch.pairs.data());
    const int64_t count = std::min(call.lanes, call.shape.rows() - row);
    native_values(scratch.pairs.data(), count, tile, shrink, out, call.shape.latent);
  }
}
#endif

} // namespace

void attend_part(Call& call, int64_t b, int64_t part, Scratch& scratch) {
  const int64_t at = b * call.parts + part, queries = call.shape.queries;
  const Softmax state{
      call.top.data() + at * call.padded,
      call.total.data() + at * call.padded,
      call.out.data() + at * call.padded * call.shape.latent};
  std::fill_n(state.top, call.padded, UNSEEN);
  std::fill_n(state.total, call.padded, 0.0f);
  std::fill_n(state.out, call.padded * call.shape.latent, 0.0f);
  const auto* first = call.visible.first.data() + b * queries;
  const auto* last = call.visible.last.data() + b * queries;
  // What no query of the row sees is not read.
  int64_t begin = call.cache.keys, end = 0;
  for (int64_t query = 0; query < queries; ++query)
    if (first[query] < last[query]) {
      begin = std::min<int64_t>(begin, first[query]);
      end = std::max<int64_t>(end, last[query]);
    }
  begin = std::max(begin, part * call.part);
  end = std::min(end, (part + 1) * call.part);
  scratch.scores.resize(TILE * call.padded);
  for (int64_t key = begin; key < end; key += TILE) {
    const int64_t keys = std::min(TILE, end - key);
#if defined(CPU_CAPABILITY_AVX512)
    if (call.narrow) {
      attend_narrow(call, b, key, keys, scratch, state);
      continue;
    }
#endif
    attend_wide(call, b, key, keys, scratch, state);
  }
}

} // namespace deepseek
