// A token of the latent cache in bytes, as attention.packed_latents defines it: e4m3 codes of the latent, a
// float32 scale for each group of 128 of them, the rotated key in bfloat16. Nothing has to be aligned.
#pragma once

#include "rows_of_values.h"

#include <c10/util/Float8_e4m3fn.h>

#include <cmath>

namespace deepseek {

constexpr int64_t GROUP = 128;

inline int64_t groups_of(int64_t latent) {
  return (latent + GROUP - 1) / GROUP;
}

inline int64_t packed_bytes(int64_t latent, int64_t rotated) {
  return latent + 4 * groups_of(latent) + 2 * rotated;
}

// A NaN decides no scale, and an infinity makes its group NaN.
inline float scale_of(const float* values, int64_t count) {
  float most = 1e-4f;
  for (int64_t k = 0; k < count; ++k) {
    const float size = std::fabs(values[k]);
    if (size > most)
      most = size;
  }
  return most / 448.0f;
}

inline uint8_t encode(float value, float scale) {
  const float quotient = value / scale;
  if (quotient != quotient || std::isinf(scale))
    return 0x7F;
  return c10::Float8_e4m3fn(std::min(std::max(quotient, -448.0f), 448.0f)).x;
}

inline void pack_row(const float* values, int64_t latent, int64_t rotated, uint8_t* to) {
  uint8_t* scales = to + latent;
  for (int64_t first = 0; first < latent; first += GROUP, scales += 4) {
    const int64_t last = std::min(first + GROUP, latent);
    const float scale = scale_of(values + first, last - first);
    for (int64_t k = first; k < last; ++k)
      to[k] = encode(values[k], scale);
    std::memcpy(scales, &scale, 4);
  }
  for (int64_t k = 0; k < rotated; ++k) {
    const BFloat16 value(values[latent + k]);
    std::memcpy(scales + 2 * k, &value, 2);
  }
}

// Latents are float32(code) * scale, rounded to T once; keys as they are.
template <class T>
void unpack_row(const uint8_t* from, int64_t latent, int64_t rotated, T* to) {
  const Code* codes = reinterpret_cast<const Code*>(from);
  const uint8_t* scales = from + latent;
  for (int64_t first = 0; first < latent; first += GROUP, scales += 4) {
    float scale;
    std::memcpy(&scale, scales, 4);
    const Vec factor(scale * CODE_UNIT);
    const int64_t last = std::min(first + GROUP, latent);
    int64_t k = first;
    Vec low, high;
    for (; k + STEP <= last; k += STEP) {
      load_pair(codes + k, low, high);
      store_pair(to + k, low * factor, high * factor);
    }
    if (k < last) {
      Code rest[STEP] = {};
      alignas(64) T values[STEP];
      std::memcpy(rest, codes + k, last - k);
      load_pair(rest, low, high);
      store_pair(values, low * factor, high * factor);
      std::memcpy(to + k, values, (last - k) * sizeof(T));
    }
  }
  for (int64_t k = 0; k < rotated; ++k) {
    BFloat16 value;
    std::memcpy(&value, scales + 2 * k, 2);
    to[latent + k] = static_cast<T>(static_cast<float>(value));
  }
}

} // namespace deepseek
