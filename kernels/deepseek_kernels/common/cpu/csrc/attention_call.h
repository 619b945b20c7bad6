// One call of absorbed attention: what all threads read, and where parts of the keys leave their results.
#pragma once

#include "vectors.h"

#include <c10/core/ScalarType.h>

#include <vector>

namespace deepseek {

// Keys of the batch: one stretch of memory for each row, or pages.
struct Cache {
  const char* data;
  c10::ScalarType dtype;
  int64_t row_bytes, key_bytes; // strides; in pages, row_bytes is a page's
  int64_t keys; // of a row, at most
  const int32_t* table = nullptr; // [batch, pages]
  int64_t pages = 0, page_size = 0;

  const char* key(int64_t row, int64_t at) const {
    if (!table)
      return data + row * row_bytes + at * key_bytes;
    return data + table[row * pages + at / page_size] * row_bytes + at % page_size * key_bytes;
  }
};

// The keys that each query sees: from `first` to `last` - 1, and of those what the mask lets it see, if there is one.
struct Visible {
  std::vector<int32_t> first, last; // [batch, queries]
  const bool* mask = nullptr;
  int64_t batch_stride = 0, query_stride = 0, key_stride = 0;
};

struct Shape {
  int64_t batch, queries, heads, latent, rotated;
  int64_t width() const {
    return latent + rotated;
  }
  int64_t rows() const {
    return queries * heads;
  }
};

struct Call {
  Shape shape;
  Cache cache;
  Visible visible;
  float scale;
  bool narrow; // bfloat16 instructions
  int64_t lanes, padded; // rows of a vector; all rows up to a multiple of it
  int64_t part, parts; // keys of a part
  std::vector<float> wide_q; // [batch, width, padded]
  std::vector<BFloat16> narrow_q; // [batch, width / 2, padded, 2]
  std::vector<float> top, total, out; // [batch, parts, padded], [...], [..., latent]
};

// Memory of a thread: one tile of keys, and what is computed of it.
struct Scratch {
  std::vector<float> wide, scores;
  std::vector<BFloat16> narrow, pairs, zeros;
};

// Attends to part `part` of the keys of row `b` of the batch, and leaves the state of its softmax in `call`.
void attend_part(Call& call, int64_t b, int64_t part, Scratch& scratch);

} // namespace deepseek
