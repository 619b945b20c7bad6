// Softmax of tiles of scores [keys, LANES], a row of the attention in each lane.
#pragma once

#include "prompt_call.h"

namespace deepseek::prompt {

constexpr int64_t VECTORS = LANES / WIDTH;

// 2^x for x <= 0: zero of -infinity, exact for whole numbers on AVX-512.
inline Vec power_of_two(const Vec& x) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m512 value = _mm512_max_ps(_mm512_set1_ps(-200.0f), x); // a NaN stays one
  const __m512 whole = _mm512_roundscale_ps(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 rest = _mm512_sub_ps(value, whole);
  // ln(2)^k / k!: on -1/2 to 1/2 what is left out is less than a unit in the last place.
  __m512 sum = _mm512_set1_ps(1.5403530e-4f);
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.3333558e-3f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(9.6181291e-3f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(5.5504109e-2f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(2.4022651e-1f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(6.9314718e-1f));
  sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(sum, whole);
#else
  return (x * Vec(0.6931471805599453f)).exp();
#endif
}

// Makes the scores of keys that a row does not see -infinity.
inline void hide(const Sight& sight, int64_t begin, int64_t keys, int64_t lanes, float* scores) {
  if (sight.sees_all(begin, begin + keys))
    return;
  const bool spans = !sight.bits && (begin < sight.most_first || begin + keys > sight.least_last);
  const Vec hidden(HIDDEN);
  for (int64_t lane = 0; spans && lane < lanes; lane += WIDTH) {
    const Vec first = Vec::loadu(sight.first + lane), last = Vec::loadu(sight.last + lane);
    for (int64_t key = 0; key < keys; ++key) {
      const Vec index(static_cast<float>(begin + key));
      float* at = scores + key * LANES + lane;
      Vec::blendv(Vec::loadu(at), hidden, (index < first) | (index >= last)).store(at);
    }
  }
  for (int64_t key = 0; sight.bits && key < keys; ++key) {
    const uint64_t bits = sight.bits[begin + key];
    float* row = scores + key * LANES;
#if defined(CPU_CAPABILITY_AVX512)
    for (int64_t lane = 0; lane < lanes; lane += WIDTH) {
      const auto unseen = static_cast<__mmask16>(~(bits >> lane));
      _mm512_mask_storeu_ps(row + lane, unseen, hidden);
    }
#else
    for (int64_t lane = 0; lane < lanes; ++lane)
      row[lane] = bits >> lane & 1 ? row[lane] : HIDDEN;
#endif
  }
}

// The greatest score so far in each lane, times the factor, at `top`; and by what the sums so far shrink.
inline void raise(const float* scores, int64_t keys, int64_t lanes, float factor, float* top, float* shrink) {
  for (int64_t lane = 0; lane < lanes; lane += WIDTH) {
    Vec most[4] = {Vec(HIDDEN), Vec(HIDDEN), Vec(HIDDEN), Vec(HIDDEN)};
    int64_t key = 0;
    const float* at = scores + lane;
    for (; key + 4 <= keys; key += 4)
      for (int i = 0; i < 4; ++i)
        most[i] = at::vec::clamp_min(Vec::loadu(at + (key + i) * LANES), most[i]);
    for (; key < keys; ++key)
      most[0] = at::vec::clamp_min(Vec::loadu(at + key * LANES), most[0]);
    Vec all = at::vec::clamp_min(at::vec::clamp_min(most[0], most[1]), at::vec::clamp_min(most[2], most[3]));
    const Vec before = Vec::loadu(top + lane);
    all = at::vec::clamp_min(all * Vec(factor), before);
    const Vec base = Vec::blendv(all, Vec(0.0f), all == Vec(HIDDEN));
    power_of_two(before - base).store(shrink + lane);
    all.store(top + lane);
  }
}

// 2^(factor * score - base) in place of the scores, where the base is `top` or 0 for a lane that has seen nothing; adds
// to the sums.
inline void exponentials(float* scores, int64_t keys, int64_t lane, float factor, const float* top, Vec& sum) {
  const Vec highest = Vec::loadu(top + lane), base = Vec::blendv(highest, Vec(0.0f), highest == Vec(HIDDEN));
  for (int64_t key = 0; key < keys; ++key) {
    float* at = scores + key * LANES + lane;
    const Vec weight = power_of_two(at::vec::fmsub(Vec::loadu(at), Vec(factor), base));
    weight.store(at);
    sum = sum + weight;
  }
}

#if defined(CPU_CAPABILITY_AVX512)
// Values of two keys in 16 lanes as units.
BFLOAT16_CODE inline __m512i paired(__m512 even, __m512 odd) {
  alignas(64) static constexpr uint16_t ORDER[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8,  24, 9,  25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(ORDER), (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

// The same in bfloat16, as [keys / 2, LANES] units.
BFLOAT16_CODE inline void narrow_exponentials(
    const float* scores, int64_t keys, int64_t lane, float factor, const float* top, Vec& sum, Unit* pairs) {
  const Vec highest = Vec::loadu(top + lane), base = Vec::blendv(highest, Vec(0.0f), highest == Vec(HIDDEN));
  const Vec by(factor);
  for (int64_t key = 0; key < keys; key += 2) {
    const float* at = scores + key * LANES + lane;
    const Vec even = power_of_two(at::vec::fmsub(Vec::loadu(at), by, base));
    Vec odd(0.0f);
    if (key + 1 < keys)
      odd = power_of_two(at::vec::fmsub(Vec::loadu(at + LANES), by, base));
    sum = sum + (even + odd);
    _mm512_storeu_si512(pairs + key / 2 * LANES + lane, paired(even, odd));
  }
}
#endif

// Weights of a tile in units [keys in units, LANES]: of float32 the scores themselves, else `pairs`.
template <bool NARROW>
const Unit* weigh(
    float* scores, int64_t keys, int64_t lanes, float factor, float* top, float* total, float* shrink, Unit* pairs) {
  raise(scores, keys, lanes, factor, top, shrink);
  for (int64_t lane = 0; lane < lanes; lane += WIDTH) {
    Vec sum = Vec::loadu(total + lane) * Vec::loadu(shrink + lane);
#if defined(CPU_CAPABILITY_AVX512)
    if constexpr (NARROW)
      narrow_exponentials(scores, keys, lane, factor, top, sum, pairs);
    else
      exponentials(scores, keys, lane, factor, top, sum);
#else
    exponentials(scores, keys, lane, factor, top, sum);
#endif
    sum.store(total + lane);
  }
  return NARROW ? pairs : reinterpret_cast<const Unit*>(scores);
}

} // namespace deepseek::prompt
