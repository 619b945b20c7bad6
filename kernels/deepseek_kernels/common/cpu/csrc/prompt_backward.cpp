// Gradients of attention of many queries, one head of one row of the batch at a time: for each tile of keys, all
// groups of queries that see it.

#include "prompt_call.h"
#include "prompt_packing.h"
#include "prompt_softmax.h"

#include <ATen/Parallel.h>

namespace deepseek::prompt {

namespace {

constexpr int64_t KEYS = 128; // of a tile
constexpr int64_t PARTS = int64_t(1) << 24; // values of the shared key's gradients, one for each head, at a time

// Operands of a group of rows, in the layouts that its five products read.
struct Group {
  Sight sight;
  const Unit *q, *grad; // [units, LANES]
  const Unit *paired_q, *paired_grad; // [LANES in units, lanes of features]
  const float *log_sum, *delta; // [LANES]
  float* q_grad; // [width, LANES]
};

struct Head {
  int64_t width, values, q_lanes, v_lanes, q_units, v_units, row_units; // lanes: features up to a multiple of WIDTH
  Buffer<Unit> q, grad, paired_q, paired_grad;
  Buffer<float> log_sum, delta, q_grad;
  std::vector<Group> groups;
  Buffer<Unit> rows; // of a group
  // Of a tile of keys.
  Buffer<Unit> key_units, value_rows, paired_keys, weights, ds, paired_ds;
  Buffer<float> scores, dp, k_grad, v_grad;

  explicit Head(const Call& call)
      : width(call.width()),
        values(call.values),
        q_lanes(up_to(width, WIDTH)),
        v_lanes(up_to(values, WIDTH)),
        q_units(call.units(width)),
        v_units(call.units(values)),
        row_units(call.units(LANES)),
        q(call.groups() * q_units * LANES),
        grad(call.groups() * v_units * LANES),
        paired_q(call.groups() * row_units * q_lanes),
        paired_grad(call.groups() * row_units * v_lanes),
        log_sum(call.groups() * LANES),
        delta(call.groups() * LANES),
        q_grad(call.groups() * width * LANES),
        groups(call.groups()),
        rows(LANES * std::max(q_units, v_units)),
        key_units(KEYS * q_units),
        value_rows(KEYS * v_units),
        paired_keys(call.units(KEYS) * width),
        weights(KEYS * row_units),
        ds(KEYS * row_units),
        paired_ds(call.units(KEYS) * LANES),
        scores(KEYS * LANES),
        dp(KEYS * LANES),
        k_grad(KEYS * q_lanes),
        v_grad(KEYS * v_lanes) {}
};

// The sum of `grad * out` of a row.
float dot(c10::ScalarType dtype, const char* a, const char* b, int64_t count, std::vector<float>& room) {
  room.resize(2 * count);
  load_row(dtype, a, count, room.data());
  load_row(dtype, b, count, room.data() + count);
  float sum = 0.0f;
  for (int64_t k = 0; k < count; ++k)
    sum += room[k] * room[count + k];
  return sum;
}

template <bool NARROW>
void load_group(const Call& call, const Gradients& to, int64_t b, int64_t head, int64_t index, Head& room) {
  Group& group = room.groups[index];
  group.sight = sight_of(call, b, index);
  const int64_t rows = group.sight.rows, begin = index * LANES;
  Unit *q = room.q.get() + index * room.q_units * LANES, *grad = room.grad.get() + index * room.v_units * LANES;
  Unit* paired_q = room.paired_q.get() + index * room.row_units * room.q_lanes;
  Unit* paired_grad = room.paired_grad.get() + index * room.row_units * room.v_lanes;
  std::fill_n(paired_q, room.row_units * room.q_lanes, 0);
  std::fill_n(paired_grad, room.row_units * room.v_lanes, 0);
  const float* own_sums = to.log_sum + (b * call.heads + head) * call.rows + begin;
  // A row that sees nothing has no gradient, whatever it and that of its result are.
  const auto drop_unseen = [&](int64_t units) {
    for (int64_t row = 0; row < rows; ++row)
      if (own_sums[row] == -HIDDEN)
        std::fill_n(room.rows.get() + row * units, units, 0);
  };
  copy_rows<NARROW>(call, call.q, b, head, begin, rows, room.width, room.rows.get());
  drop_unseen(room.q_units);
  put_in_lanes(room.rows.get(), rows, room.q_units, q);
  put_in_pairs<NARROW>(room.rows.get(), room.q_units, rows, room.width, paired_q, room.q_lanes);
  copy_rows<NARROW>(call, to.grad, b, head, begin, rows, room.values, room.rows.get());
  drop_unseen(room.v_units);
  put_in_lanes(room.rows.get(), rows, room.v_units, grad);
  put_in_pairs<NARROW>(room.rows.get(), room.v_units, rows, room.values, paired_grad, room.v_lanes);
  float *log_sum = room.log_sum.get() + begin, *delta = room.delta.get() + begin;
  std::fill_n(log_sum, LANES, -HIDDEN);
  std::fill_n(delta, LANES, 0.0f);
  std::vector<float> values;
  for (int64_t row = 0; row < rows; ++row) {
    log_sum[row] = own_sums[row];
    const char *own = to.grad.at(b, begin + row, head), *out = to.out.at(b, begin + row, head);
    delta[row] = log_sum[row] == -HIDDEN ? 0.0f : dot(call.dtype, own, out, room.values, values);
  }
  float* q_grad = room.q_grad.get() + begin * room.width;
  std::fill_n(q_grad, room.width * LANES, 0.0f);
  group = {group.sight, q, grad, paired_q, paired_grad, log_sum, delta, q_grad};
}

// Weights at `scores` and the scores' gradients at `dp`; keys that a lane does not see weigh nothing.
void differentiate_tile(float* scores, float* dp, int64_t keys, int64_t lanes, const Group& group, const Call& call) {
  const Vec factor(call.factor()), scale(call.scale);
  for (int64_t lane = 0; lane < lanes; lane += WIDTH) {
    const Vec sum = Vec::loadu(group.log_sum + lane), delta = Vec::loadu(group.delta + lane);
    for (int64_t key = 0; key < keys; ++key) {
      float *score = scores + key * LANES + lane, *gradient = dp + key * LANES + lane;
      const Vec weight = power_of_two(at::vec::fmsub(Vec::loadu(score), factor, sum));
      weight.store(score);
      (weight * (Vec::loadu(gradient) - delta) * scale).store(gradient);
    }
  }
}

#if defined(CPU_CAPABILITY_AVX512)
// [keys, LANES] as bfloat16 in units along the lanes, and along the keys if `paired` is given.
BFLOAT16_CODE void narrow_rows(const float* from, int64_t keys, Unit* to, Unit* pairs) {
  for (int64_t key = 0; key < keys; ++key)
    for (int64_t lane = 0; lane < LANES; lane += 2 * WIDTH) {
      const __m512 low = _mm512_loadu_ps(from + key * LANES + lane);
      const __m512 high = _mm512_loadu_ps(from + key * LANES + lane + WIDTH);
      _mm512_storeu_si512(to + (key * LANES + lane) / 2, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
  for (int64_t key = 0; pairs && key < keys; key += 2)
    for (int64_t lane = 0; lane < LANES; lane += WIDTH) {
      const __m512 even = _mm512_loadu_ps(from + key * LANES + lane);
      const __m512 odd = key + 1 < keys ? _mm512_loadu_ps(from + (key + 1) * LANES + lane) : _mm512_setzero_ps();
      _mm512_storeu_si512(pairs + key / 2 * LANES + lane, paired(even, odd));
    }
}
#endif

template <bool NARROW>
void add_gradients(const Call& call, int64_t begin, int64_t keys, const Group& group, const Head& room) {
  float *scores = room.scores.get(), *dp = room.dp.get();
  multiply<NARROW>({room.key_units.get(), room.q_units, 1, group.q, LANES, room.q_units, scores, LANES}, keys, LANES);
  multiply<NARROW>(
      {room.value_rows.get(), room.v_units, 1, group.grad, LANES, room.v_units, dp, LANES}, keys, LANES);
  hide(group.sight, begin, keys, LANES, scores);
  differentiate_tile(scores, dp, keys, LANES, group, call);
  const Unit *weights = reinterpret_cast<Unit*>(scores), *ds = reinterpret_cast<Unit*>(dp), *paired_ds = ds;
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (NARROW) {
    narrow_rows(scores, keys, room.weights.get(), nullptr);
    narrow_rows(dp, keys, room.ds.get(), room.paired_ds.get());
    weights = room.weights.get(), ds = room.ds.get(), paired_ds = room.paired_ds.get();
  }
#endif
  const int64_t rows = room.row_units;
  multiply<NARROW>(
      {weights, rows, 1, group.paired_grad, room.v_lanes, rows, room.v_grad.get(), room.v_lanes, Keep::all},
      keys,
      room.v_lanes);
  multiply<NARROW>(
      {ds, rows, 1, group.paired_q, room.q_lanes, rows, room.k_grad.get(), room.q_lanes, Keep::all},
      keys,
      room.q_lanes);
  multiply<NARROW>(
      {room.paired_keys.get(), 1, room.width, paired_ds, LANES, call.units(keys), group.q_grad, LANES, Keep::all},
      room.width,
      LANES);
}

// Gradients of the keys begin to end - 1, of which those `from` to `from + keys` - 1 have any.
void store_keys(
    const Call& call, const Gradients& to, int64_t b, int64_t head, int64_t begin, int64_t end, int64_t from,
    int64_t keys, const Head& room, float* common) {
  const int64_t size = c10::elementSize(call.dtype), width = call.own + call.values;
  for (int64_t key = begin; key < end; ++key) {
    char* row = to.kv + ((b * call.keys + key) * call.heads + head) * width * size;
    if (key < from || key >= from + keys) {
      std::memset(row, 0, width * size);
      std::fill_n(common + key * call.shared, call.shared, 0.0f);
      continue;
    }
    const float* k = room.k_grad.get() + (key - from) * room.q_lanes;
    store_row(call.dtype, k, call.own, row);
    store_row(call.dtype, room.v_grad.get() + (key - from) * room.v_lanes, call.values, row + call.own * size);
    std::copy_n(k + call.own, call.shared, common + key * call.shared);
  }
}

void store_queries(const Call& call, const Gradients& to, int64_t b, int64_t head, const Head& room) {
  const int64_t size = c10::elementSize(call.dtype);
  std::vector<float> values(room.width);
  for (int64_t row = 0; row < call.rows; ++row) {
    const float* from = room.groups[row / LANES].q_grad + row % LANES;
    for (int64_t k = 0; k < room.width; ++k)
      values[k] = from[k * LANES];
    store_row(
        call.dtype, values.data(), room.width, to.q + ((b * call.rows + row) * call.heads + head) * room.width * size);
  }
}

// `common`: [keys, shared], this head's share of the shared keys' gradients.
template <bool NARROW>
void differentiate_head(const Call& call, const Gradients& to, int64_t b, int64_t head, Head& room, float* common) {
  int64_t seen_from = call.keys, seen_to = 0;
  for (int64_t index = 0; index < call.groups(); ++index) {
    load_group<NARROW>(call, to, b, head, index, room);
    const Sight& sight = room.groups[index].sight;
    if (sight.least_first < sight.most_last) {
      seen_from = std::min(seen_from, sight.least_first);
      seen_to = std::max(seen_to, sight.most_last);
    }
  }
  for (int64_t begin = 0; begin < call.keys; begin += KEYS) {
    const int64_t end = std::min(begin + KEYS, call.keys);
    // Keys that no query sees are not read.
    const int64_t from = std::max(begin, seen_from), keys = std::max<int64_t>(0, std::min(end, seen_to) - from);
    std::fill_n(room.k_grad.get(), keys * room.q_lanes, 0.0f);
    std::fill_n(room.v_grad.get(), keys * room.v_lanes, 0.0f);
    if (keys > 0) {
      copy_keys<NARROW>(call, b, head, from, keys, room.key_units.get());
      copy_rows<NARROW>(call, call.v, b, head, from, keys, room.values, room.value_rows.get());
      put_in_pairs<NARROW>(room.key_units.get(), room.q_units, keys, room.width, room.paired_keys.get(), room.width);
      for (const Group& group : room.groups)
        if (group.sight.sees(from, from + keys))
          add_gradients<NARROW>(call, from, keys, group, room);
    }
    store_keys(call, to, b, head, begin, end, from, keys, room, common);
  }
  store_queries(call, to, b, head, room);
}

} // namespace

void differentiate(const Call& call, const Gradients& to) {
  const int64_t size = call.keys * call.shared; // of one head's share
  const int64_t some = std::clamp<int64_t>(PARTS / std::max<int64_t>(1, size), 1, call.batch * call.heads);
  Buffer<float> parts(some * size);
  for (int64_t begin = 0; begin < call.batch * call.heads; begin += some) {
    const int64_t end = std::min(begin + some, call.batch * call.heads);
    at::parallel_for(begin, end, 1, [&](int64_t first, int64_t last) {
      Head room(call);
      for (int64_t pair = first; pair < last; ++pair) {
        float* common = parts.get() + (pair - begin) * size;
        if (call.narrow)
          differentiate_head<true>(call, to, pair / call.heads, pair % call.heads, room, common);
        else
          differentiate_head<false>(call, to, pair / call.heads, pair % call.heads, room, common);
      }
    });
    // Heads are added in their order, whatever the number of threads.
    at::parallel_for(0, size, 1 << 12, [&](int64_t first, int64_t last) {
      for (int64_t pair = begin; pair < end; ++pair) {
        const float* from = parts.get() + (pair - begin) * size;
        float* total = to.common + pair / call.heads * size;
        for (int64_t k = first; k < last; ++k)
          total[k] += from[k];
      }
    });
  }
}

} // namespace deepseek::prompt
