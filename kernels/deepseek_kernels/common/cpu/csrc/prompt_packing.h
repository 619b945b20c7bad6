// Operands of tiles in units: rows as they are, rows in lanes, and rows in pairs.
#pragma once

#include "prompt_call.h"

namespace deepseek::prompt {

// Copies `count` values of `dtype` to a row of units: bfloat16 as they are, all others as float32.
template <bool NARROW>
void copy_values(c10::ScalarType dtype, const void* from, int64_t count, Unit* row, int64_t at) {
  if constexpr (NARROW)
    std::memcpy(reinterpret_cast<char*>(row) + 2 * at, from, 2 * count);
  else
    load_row(dtype, from, count, reinterpret_cast<float*>(row) + at);
}

// [units, LANES] of up to LANES rows, each of `units` units; the other lanes are zeros.
inline void put_in_lanes(const Unit* rows, int64_t count, int64_t units, Unit* to) {
  for (int64_t first = 0; first < units; first += 16) {
    const int64_t last = std::min(units, first + 16);
    for (int64_t lane = 0; lane < count; ++lane)
      for (int64_t unit = first; unit < last; ++unit)
        to[unit * LANES + lane] = rows[lane * units + unit];
    for (int64_t unit = first; unit < last; ++unit)
      std::fill(to + unit * LANES + count, to + (unit + 1) * LANES, 0);
  }
}

// [count in units, stride] of rows of `width` values each, which are `row_units` units apart: neighbouring rows share
// units. Features from `width` on are zeros.
template <bool NARROW>
void put_in_pairs(const Unit* rows, int64_t row_units, int64_t count, int64_t width, Unit* to, int64_t stride) {
  if constexpr (NARROW) {
    for (int64_t row = 0; row < count; row += 2) {
      const auto* low = reinterpret_cast<const uint16_t*>(rows + row * row_units);
      const auto* high = reinterpret_cast<const uint16_t*>(rows + (row + 1) * row_units);
      Unit* unit = to + row / 2 * stride;
      if (row + 1 < count)
        for (int64_t k = 0; k < width; ++k)
          unit[k] = low[k] | static_cast<Unit>(high[k]) << 16;
      else
        for (int64_t k = 0; k < width; ++k)
          unit[k] = low[k];
      std::fill(unit + width, unit + stride, 0);
    }
  } else {
    for (int64_t row = 0; row < count; ++row) {
      std::memcpy(to + row * stride, rows + row * row_units, width * sizeof(Unit));
      std::fill(to + row * stride + width, to + (row + 1) * stride, 0);
    }
  }
}

// Rows begin to begin + count - 1 of `x` [.., width] as [count, units].
template <bool NARROW>
void copy_rows(
    const Call& call, const Strided& x, int64_t b, int64_t head, int64_t begin, int64_t count, int64_t width, Unit* to) {
  const int64_t units = call.units(width);
  for (int64_t row = 0; row < count; ++row) {
    to[(row + 1) * units - 1] = 0; // half of it is beyond an odd width
    copy_values<NARROW>(call.dtype, x.at(b, begin + row, head), width, to + row * units, 0);
  }
}

// Keys begin to begin + count - 1 as [count, units], their own features before the shared ones.
template <bool NARROW>
void copy_keys(const Call& call, int64_t b, int64_t head, int64_t begin, int64_t count, Unit* to) {
  const int64_t units = call.units(call.width());
  for (int64_t i = 0; i < count; ++i) {
    Unit* row = to + i * units;
    const int64_t key = call.place(b, begin + i);
    const char* own = call.k.at(b, key, head);
    row[units - 1] = 0;
    if (call.key_dtype == c10::ScalarType::Byte) {
      using Value = std::conditional_t<NARROW, BFloat16, float>;
      const int64_t rotated = call.own - call.values;
      unpack_row(reinterpret_cast<const uint8_t*>(own), call.values, rotated, reinterpret_cast<Value*>(row));
      continue;
    }
    copy_values<NARROW>(call.key_dtype, own, call.own, row, 0);
    if (call.shared)
      copy_values<NARROW>(call.key_dtype, call.common.at(b, key, 0), call.shared, row, call.own);
  }
}

// The values of these keys as [count in units, values]; `rows` is room for [count, units].
template <bool NARROW>
void copy_paired_values(
    const Call& call, const Unit* keys, int64_t b, int64_t head, int64_t begin, int64_t count, Unit* rows, Unit* to) {
  if (!call.v.data) // the first features of the keys
    return put_in_pairs<NARROW>(keys, call.units(call.width()), count, call.values, to, call.values);
  const int64_t units = call.units(call.values);
  copy_rows<NARROW>(call, call.v, b, head, begin, count, call.values, rows);
  put_in_pairs<NARROW>(rows, units, count, call.values, to, call.values);
}

} // namespace deepseek::prompt
