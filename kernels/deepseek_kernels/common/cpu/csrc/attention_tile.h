// Absorbed attention on a tile of keys: all heads read the same keys, whose first C features are their values.
//
// Rows are pairs of a query and a head. Scores are held with the rows side by side, so that the lanes of a vector are
// rows, and no sum goes across lanes.
#pragma once

#include "vectors.h"

#include <cmath>
#include <limits>

namespace deepseek {

constexpr int64_t TILE = 64; // keys
constexpr float UNSEEN = -std::numeric_limits<float>::infinity();

// The running state of `rows` rows: greatest score, sum of exponentials, weighted sum of latents relative to it.
struct Softmax {
  float* top; // [rows]
  float* total; // [rows]
  float* out; // [rows, latent]
};

// `keys` rows of `width` float32 values, `stride` apart.
struct WideTile {
  const float* data;
  int64_t stride, keys;
};

// scores[key, row] = q[., row] . tile[key] for WIDTH rows, those from `q` on; rows are `rows` apart.
template <int KEYS>
void wide_scores(const float* q, int64_t rows, const float* keys, int64_t stride, int64_t width, float* scores) {
  Vec sums[KEYS];
  for (int key = 0; key < KEYS; ++key)
    sums[key] = Vec(0.0f);
  for (int64_t d = 0; d < width; ++d) {
    const Vec query = Vec::loadu(q + d * rows);
    for (int key = 0; key < KEYS; ++key)
      sums[key] = at::vec::fmadd(query, Vec(keys[key * stride + d]), sums[key]);
  }
  for (int key = 0; key < KEYS; ++key)
    sums[key].store(scores + key * rows);
}

inline void wide_scores(const float* q, int64_t rows, const WideTile& tile, int64_t width, float* scores) {
  int64_t key = 0;
  for (; key + 8 <= tile.keys; key += 8)
    wide_scores<8>(q, rows, tile.data + key * tile.stride, tile.stride, width, scores + key * rows);
  for (; key < tile.keys; ++key)
    wide_scores<1>(q, rows, tile.data + key * tile.stride, tile.stride, width, scores + key * rows);
}

// Turns scores [keys, rows] of WIDTH rows into exponentials relative to the greatest so far, and returns by what the
// sums so far shrink. A row that has seen nothing but -inf keeps zeros.
inline Vec exponentials(float* scores, int64_t rows, int64_t keys, const Softmax& state) {
  const Vec before = Vec::loadu(state.top);
  Vec top = before;
  for (int64_t key = 0; key < keys; ++key)
    top = at::vec::maximum(top, Vec::loadu(scores + key * rows));
  const Vec base = Vec::blendv(top, Vec(0.0f), top == Vec(UNSEEN));
  Vec sum(0.0f);
  for (int64_t key = 0; key < keys; ++key) {
    const Vec weight = (Vec::loadu(scores + key * rows) - base).exp();
    weight.store(scores + key * rows);
    sum = sum + weight;
  }
  const Vec shrink = (before - base).exp();
  top.store(state.top);
  at::vec::fmadd(Vec::loadu(state.total), shrink, sum).store(state.total);
  return shrink;
}

// out[row] = out[row] * shrink[row] + sum over keys of weights[key, row] * tile[key], for ROWS rows and VECTORS vectors.
template <int ROWS, int VECTORS>
void wide_values(
    const float* weights, int64_t rows, const WideTile& tile, const float* shrink, float* out, int64_t latent) {
  Vec sums[ROWS][VECTORS];
  for (int row = 0; row < ROWS; ++row)
    for (int i = 0; i < VECTORS; ++i)
      sums[row][i] = Vec::loadu(out + row * latent + i * WIDTH) * Vec(shrink[row]);
  for (int64_t key = 0; key < tile.keys; ++key) {
    const float* values = tile.data + key * tile.stride;
    Vec loaded[VECTORS];
    for (int i = 0; i < VECTORS; ++i)
      loaded[i] = Vec::loadu(values + i * WIDTH);
    for (int row = 0; row < ROWS; ++row) {
      const Vec weight(weights[key * rows + row]);
      for (int i = 0; i < VECTORS; ++i)
        sums[row][i] = at::vec::fmadd(weight, loaded[i], sums[row][i]);
    }
  }
  for (int row = 0; row < ROWS; ++row)
    for (int i = 0; i < VECTORS; ++i)
      sums[row][i].store(out + row * latent + i * WIDTH);
}

inline void wide_values_of_one(
    const float* weights, int64_t rows, const WideTile& tile, float shrink, float* out, int64_t feature) {
  float sum = out[feature] * shrink;
  for (int64_t key = 0; key < tile.keys; ++key)
    sum += weights[key * rows] * tile.data[key * tile.stride + feature];
  out[feature] = sum;
}

// The values of `count` <= WIDTH rows.
inline void wide_values(
    const float* weights,
    int64_t rows,
    int64_t count,
    const WideTile& tile,
    const float* shrink,
    float* out,
    int64_t latent) {
  int64_t feature = 0;
  for (; feature + STEP <= latent; feature += STEP) {
    const WideTile part{tile.data + feature, tile.stride, tile.keys};
    int64_t row = 0;
    for (; row + 4 <= count; row += 4)
      wide_values<4, 2>(weights + row, rows, part, shrink + row, out + row * latent + feature, latent);
    for (; row < count; ++row)
      wide_values<1, 2>(weights + row, rows, part, shrink + row, out + row * latent + feature, latent);
  }
  for (; feature < latent; ++feature)
    for (int64_t row = 0; row < count; ++row)
      wide_values_of_one(weights + row, rows, tile, shrink[row], out + row * latent, feature);
}

} // namespace deepseek
