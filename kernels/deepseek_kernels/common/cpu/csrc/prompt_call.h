// One call of attention of many queries, on the keys of each head or on latents that all heads share.
//
// Rows are the queries of one head, or the pairs of a query and a head where heads share their keys; 64 of them, a
// group, lie side by side in the lanes of vectors. Keys are read tile by tile.
#pragma once

#include "packing.h"
#include "tile_product.h"

#include <c10/core/ScalarType.h>

#include <limits>
#include <memory>
#include <new>
#include <vector>

namespace deepseek::prompt {

constexpr int64_t LANES = 64; // of a group
constexpr float HIDDEN = -std::numeric_limits<float>::infinity();
constexpr double LOG2_E = 1.4426950408889634;

inline int64_t up_to(int64_t number, int64_t multiple) {
  return (number + multiple - 1) / multiple * multiple;
}

// Memory at the start of a cache line, not initialized.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count = 0)
      : memory_(static_cast<T*>(::operator new(std::max<int64_t>(count, 1) * sizeof(T), std::align_val_t{64}))) {}
  T* get() const {
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(T* memory) const {
      ::operator delete(memory, std::align_val_t{64});
    }
  };
  std::unique_ptr<T, Free> memory_;
};

// A tensor [batch, rows, heads, ..] whose last dimension has no gaps.
struct Strided {
  const char* data;
  int64_t batch, row, head; // strides in bytes
  const char* at(int64_t b, int64_t r, int64_t h) const {
    return data + b * batch + r * row + h * head;
  }
};

struct Call {
  int64_t batch, rows, keys, heads;
  int64_t own, shared, values; // features of a key of its own and of one that all heads have, and of a value
  c10::ScalarType dtype; // of the queries
  c10::ScalarType key_dtype; // Byte: packed latents, all of them own
  Strided q, k, v, common;
  const int32_t* ids = nullptr; // [batch, keys]: where the keys are
  float scale;
  bool narrow; // bfloat16 instructions
  int64_t repeat = 1; // rows of one query
  std::vector<int32_t> first, last; // [batch, rows / repeat]: the keys that a row sees
  std::vector<uint64_t> bits; // [batch, groups, keys]: those that a mask lets the lanes of a group see, if there is one

  int64_t width() const {
    return own + shared;
  }
  int64_t groups() const {
    return (rows + LANES - 1) / LANES;
  }
  // Units of `count` neighbouring features, or of as many keys.
  int64_t units(int64_t count) const {
    return narrow ? (count + 1) / 2 : count;
  }
  float factor() const {
    return static_cast<float>(scale * LOG2_E);
  }
  int64_t place(int64_t b, int64_t key) const {
    return ids ? ids[b * keys + key] : key;
  }
};

// Which keys the rows of a group see.
struct Sight {
  int64_t rows; // of the group
  float first[LANES], last[LANES];
  int64_t least_first, most_first, least_last, most_last;
  const uint64_t* bits; // [keys], or null

  bool sees(int64_t begin, int64_t end) const {
    if (end <= least_first || begin >= most_last)
      return false;
    if (!bits)
      return true;
    uint64_t any = 0;
    for (int64_t key = begin; key < end; ++key)
      any |= bits[key];
    return any != 0;
  }
  bool sees_all(int64_t begin, int64_t end) const {
    return !bits && begin >= most_first && end <= least_last;
  }
};

inline Sight sight_of(const Call& call, int64_t b, int64_t group) {
  Sight sight;
  const int64_t begin = group * LANES;
  sight.rows = std::min(LANES, call.rows - begin);
  sight.least_first = sight.most_first = sight.most_last = 0;
  sight.least_last = call.keys;
  bool none = true;
  for (int64_t lane = 0; lane < LANES; ++lane) {
    // Lanes without a row see what the last row sees: nobody reads them.
    const int64_t at = b * (call.rows / call.repeat) + (begin + std::min(lane, sight.rows - 1)) / call.repeat;
    const int64_t first = call.first[at], last = std::max(call.last[at], call.first[at]);
    sight.first[lane] = static_cast<float>(first);
    sight.last[lane] = static_cast<float>(last);
    sight.most_first = std::max(sight.most_first, first);
    sight.least_last = std::min(sight.least_last, last);
    if (first < last) {
      sight.least_first = none ? first : std::min(sight.least_first, first);
      sight.most_last = std::max(sight.most_last, last);
      none = false;
    }
  }
  sight.bits = call.bits.empty() ? nullptr : call.bits.data() + (b * call.groups() + group) * call.keys;
  return sight;
}

// The results of rows, and the base-2 logarithms of their sums of exponentials, infinity of a row that sees nothing.
void attend(const Call& call, char* out, float* log_sum);

struct Gradients {
  Strided grad, out; // [batch, rows, heads, values]
  const float* log_sum; // [batch, heads, rows]
  char *q, *kv; // contiguous: [batch, rows, heads, width], [batch, keys, heads, own + values]
  float* common; // [batch, keys, shared], zeros
};

void differentiate(const Call& call, const Gradients& to);

} // namespace deepseek::prompt
