// Products of few rows of activations with the rows of a weight, at the speed at which the weight is read.
//
// Every sum has one vector of float32 accumulators, whatever the number of rows and however they are shared out, so
// that a result depends on neither the other rows of activations nor the number of threads.
#pragma once

#include "rows.h"
#include "vectors.h"

#include <algorithm>
#include <memory>

namespace deepseek {

constexpr int64_t MOST_ROWS = 8; // of activations that one reading of a weight serves

enum class Kind { float32, bfloat16, code };

// A matrix [rows, columns] without gaps. Codes have a float32 scale for each block of `block_rows` times
// `block_columns`; their rows are parts of `part_rows` that are stacked, each with a grid of its own.
struct Matrix {
  Kind kind;
  const void* data;
  int64_t columns;
  const float* scale = nullptr;
  int64_t part_rows = 1, block_rows = 1, block_columns = 1;

  int64_t row_bytes() const {
    return columns * (kind == Kind::float32 ? 4 : kind == Kind::bfloat16 ? 2 : 1);
  }
  int64_t blocks_across() const {
    return (columns + block_columns - 1) / block_columns;
  }
  int64_t blocks_down() const {
    return (part_rows + block_rows - 1) / block_rows;
  }
};

// Returns true if products of bfloat16 run on the CPU's own instructions for them (AVX512-BF16).
bool native();

// Turns those instructions off, or on again where the CPU has them: for tests and benchmarks.
void set_native(bool wanted);

// Rows of activations in the layout that products with one weight read: float32, or bfloat16 where the CPU multiplies
// that. Zeros follow each row up to a multiple of what a loop reads at once.
class Activations {
 public:
  // `half`: the values are bfloat16; the layout may be wider.
  Activations(int64_t rows, bool half, const Matrix& weight);

  int64_t rows() const {
    return rows_;
  }
  int64_t stride() const {
    return stride_;
  }
  bool narrow() const {
    return layout_ != Layout::wide;
  }
  const float* wide_row(int64_t row) const {
    return reinterpret_cast<const float*>(memory_.get()) + row * stride_;
  }
  const BFloat16* narrow_row(int64_t row) const {
    return reinterpret_cast<const BFloat16*>(memory_.get()) + row * stride_;
  }

  // Fills one row with `columns` values.
  void set_row(int64_t row, const float* values);
  void set_row(int64_t row, const BFloat16* values);

  // Stores `count` values from column `first` of one row on, rounded to bfloat16 first if the values are.
  void store(int64_t row, int64_t first, int64_t count, const float* values);

 private:
  enum class Layout { wide, narrow, interleaved };

  struct Free {
    void operator()(char* memory) const;
  };

  int64_t rows_, columns_, stride_;
  bool half_;
  Layout layout_;
  std::unique_ptr<char, Free> memory_;
};

// out[m * stride + n - first] = x[row + m] . weight[n], for the rows first <= n < last of the weight and
// 0 <= m < rows <= MOST_ROWS.
void multiply(
    const Activations& x,
    int64_t row,
    int64_t rows,
    const Matrix& weight,
    int64_t first,
    int64_t last,
    float* out,
    int64_t stride);

// The same for any number of rows of activations: with more than MOST_ROWS, tiles of sums read each row of the weight
// once. The bits are those of `multiply`.
void multiply_many(
    const Activations& x,
    int64_t row,
    int64_t rows,
    const Matrix& weight,
    int64_t first,
    int64_t last,
    float* out,
    int64_t stride);

// Returns how many rows of a weight are worth a thread.
inline int64_t rows_for_a_thread(const Matrix& weight) {
  return std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(1, weight.row_bytes()));
}

} // namespace deepseek
