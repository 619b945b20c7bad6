// How many rows the loops of a product hold in registers.
#pragma once

#include <algorithm>
#include <cstdint>

namespace deepseek {

#if defined(CPU_CAPABILITY_AVX2)
constexpr int ACCUMULATORS = 8; // of 16 registers
#else
constexpr int ACCUMULATORS = 16; // of 32
#endif

// Returns the rows of the weight that are multiplied at once by `rows` rows of activations.
constexpr int rows_at_once(int rows) {
  return std::clamp(ACCUMULATORS / rows, 1, 4);
}

// Calls `product.run<rows>()`.
template <class Product>
void with_rows(int64_t rows, const Product& product) {
  switch (rows) {
    case 0: return;
    case 1: return product.template run<1>();
    case 2: return product.template run<2>();
    case 3: return product.template run<3>();
    case 4: return product.template run<4>();
    case 5: return product.template run<5>();
    case 6: return product.template run<6>();
    case 7: return product.template run<7>();
    default: return product.template run<8>();
  }
}

} // namespace deepseek
