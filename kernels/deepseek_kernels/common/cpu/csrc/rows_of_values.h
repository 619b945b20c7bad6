// Rows of any floating dtype as float32, and back.
#pragma once

#include "vectors.h"

#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

namespace deepseek {

inline void store_pair(float* to, const Vec& first, const Vec& second) {
  first.store(to);
  second.store(to + WIDTH);
}

inline void store_pair(BFloat16* to, const Vec& first, const Vec& second) {
  at::vec::convert_float_bfloat16(first, second).store(to);
}

inline void store_pair(Half* to, const Vec& first, const Vec& second) {
  at::vec::convert_float_half(first, second).store(to);
}

template <class From, class To>
void convert_row(const From* from, int64_t count, To* to) {
  int64_t k = 0;
  for (; k + STEP <= count; k += STEP) {
    Vec first, second;
    load_pair(from + k, first, second);
    store_pair(to + k, first, second);
  }
  for (; k < count; ++k)
    to[k] = static_cast<To>(static_cast<float>(from[k]));
}

// Calls `function` with a null pointer of the type that `dtype` is: float, BFloat16 or Half.
template <class Function>
void with_dtype(c10::ScalarType dtype, const Function& function) {
  switch (dtype) {
    case c10::ScalarType::Float: return function(static_cast<float*>(nullptr));
    case c10::ScalarType::BFloat16: return function(static_cast<BFloat16*>(nullptr));
    case c10::ScalarType::Half: return function(static_cast<Half*>(nullptr));
    default: TORCH_CHECK_VALUE(false, "expected float32, bfloat16 or float16, got ", dtype);
  }
}

inline void load_row(c10::ScalarType dtype, const void* from, int64_t count, float* to) {
  with_dtype(dtype, [&](auto* type) { convert_row(static_cast<decltype(type)>(const_cast<void*>(from)), count, to); });
}

inline void store_row(c10::ScalarType dtype, const float* from, int64_t count, void* to) {
  with_dtype(dtype, [&](auto* type) { convert_row(from, count, static_cast<decltype(type)>(to)); });
}

// Rounds float32 values to `dtype` where they are.
template <class T>
void round_values(float* values, int64_t count) {
  int64_t k = 0;
  for (; k + STEP <= count; k += STEP) {
    alignas(64) T rounded[STEP];
    store_pair(rounded, Vec::loadu(values + k), Vec::loadu(values + k + WIDTH));
    Vec first, second;
    load_pair(rounded, first, second);
    store_pair(values + k, first, second);
  }
  for (; k < count; ++k)
    values[k] = static_cast<float>(static_cast<T>(values[k]));
}

inline void round_row(c10::ScalarType dtype, float* values, int64_t count) {
  if (dtype == c10::ScalarType::BFloat16)
    round_values<BFloat16>(values, count);
  else if (dtype == c10::ScalarType::Half)
    round_values<Half>(values, count);
}

} // namespace deepseek
