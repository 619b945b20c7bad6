// Attention of many queries: an online softmax over tiles of keys, for a block of rows at a time.

#include "prompt_call.h"
#include "prompt_packing.h"
#include "prompt_softmax.h"

#include <ATen/Parallel.h>

#include <cmath>

namespace deepseek::prompt {

namespace {

constexpr int64_t BLOCK_GROUPS = 4; // of 64 rows, for which a tile of keys is packed once

// Keys of a tile: scores and keys that stay in the first caches.
int64_t tile_keys(const Call& call) {
  return call.width() > 256 ? 64 : 128;
}

// What one thread works with: a block of rows and a tile of keys.
struct Room {
  int64_t keys, units, values;
  Buffer<Unit> rows, q, key_units, value_rows, value_units, pairs;
  Buffer<float> scores, top, total, out, shrink;

  explicit Room(const Call& call)
      : keys(tile_keys(call)),
        units(call.units(call.width())),
        values(call.values),
        rows(LANES * units),
        q(BLOCK_GROUPS * units * LANES),
        key_units(keys * units),
        value_rows(keys * call.units(values)),
        value_units(call.units(keys) * values),
        pairs(keys / 2 * LANES),
        scores(keys * LANES),
        top(BLOCK_GROUPS * LANES),
        total(BLOCK_GROUPS * LANES),
        out(BLOCK_GROUPS * values * LANES),
        shrink(LANES) {}
};

template <bool NARROW>
void attend_tile(
    const Call& call, const Sight& sight, int64_t begin, int64_t keys, const Room& room, int64_t group) {
  const int64_t lanes = up_to(sight.rows, WIDTH);
  float* scores = room.scores.get();
  const Unit* q = room.q.get() + group * room.units * LANES;
  multiply<NARROW>({room.key_units.get(), room.units, 1, q, LANES, room.units, scores, LANES}, keys, lanes);
  hide(sight, begin, keys, lanes, scores);
  float *top = room.top.get() + group * LANES, *total = room.total.get() + group * LANES, *shrink = room.shrink.get();
  const Unit* weights = weigh<NARROW>(scores, keys, lanes, call.factor(), top, total, shrink, room.pairs.get());
  float* out = room.out.get() + group * room.values * LANES;
  const Unit* values = room.value_units.get();
  multiply<NARROW>(
      {values, 1, room.values, weights, LANES, call.units(keys), out, LANES, Keep::shrunk, shrink}, room.values, lanes);
}

void finish_group(
    const Call& call, int64_t b, int64_t head, int64_t group, const Sight& sight, const Room& room, int64_t slot,
    char* out, float* log_sum) {
  const int64_t size = c10::elementSize(call.dtype);
  const float *top = room.top.get() + slot * LANES, *total = room.total.get() + slot * LANES;
  const float* sums = room.out.get() + slot * room.values * LANES;
  std::vector<float> row(room.values);
  for (int64_t lane = 0; lane < sight.rows; ++lane) {
    const int64_t at = group * LANES + lane;
    const bool seen = !(total[lane] == 0.0f); // a NaN is seen
    const float divisor = seen ? 1.0f / total[lane] : 0.0f;
    for (int64_t k = 0; k < room.values; ++k)
      row[k] = seen ? sums[k * LANES + lane] * divisor : 0.0f;
    store_row(call.dtype, row.data(), room.values, out + ((b * call.rows + at) * call.heads + head) * room.values * size);
    if (log_sum)
      log_sum[(b * call.heads + head) * call.rows + at] = seen ? top[lane] + std::log2(total[lane]) : -HIDDEN;
  }
}

template <bool NARROW>
void attend_block(
    const Call& call, int64_t b, int64_t head, int64_t block, const Room& room, char* out, float* log_sum) {
  const int64_t first_group = block * BLOCK_GROUPS, groups = std::min(BLOCK_GROUPS, call.groups() - first_group);
  std::vector<Sight> sights(groups);
  int64_t begin = call.keys, end = 0;
  for (int64_t slot = 0; slot < groups; ++slot) {
    Sight& sight = sights[slot] = sight_of(call, b, first_group + slot);
    if (sight.least_first < sight.most_last) {
      begin = std::min(begin, sight.least_first);
      end = std::max(end, sight.most_last);
    }
    copy_rows<NARROW>(
        call, call.q, b, head, (first_group + slot) * LANES, sight.rows, call.width(), room.rows.get());
    put_in_lanes(room.rows.get(), sight.rows, room.units, room.q.get() + slot * room.units * LANES);
  }
  std::fill_n(room.top.get(), groups * LANES, HIDDEN);
  std::fill_n(room.total.get(), groups * LANES, 0.0f);
  std::fill_n(room.out.get(), groups * room.values * LANES, 0.0f);
  for (int64_t key = begin; key < end; key += room.keys) {
    const int64_t keys = std::min(room.keys, end - key);
    copy_keys<NARROW>(call, b, head, key, keys, room.key_units.get());
    copy_paired_values<NARROW>(
        call, room.key_units.get(), b, head, key, keys, room.value_rows.get(), room.value_units.get());
    for (int64_t slot = 0; slot < groups; ++slot)
      if (sights[slot].sees(key, key + keys))
        attend_tile<NARROW>(call, sights[slot], key, keys, room, slot);
  }
  for (int64_t slot = 0; slot < groups; ++slot)
    finish_group(call, b, head, first_group + slot, sights[slot], room, slot, out, log_sum);
}

} // namespace

void attend(const Call& call, char* out, float* log_sum) {
  const int64_t blocks = (call.groups() + BLOCK_GROUPS - 1) / BLOCK_GROUPS;
  at::parallel_for(0, call.batch * call.heads * blocks, 1, [&](int64_t first, int64_t last) {
    const Room room(call);
    for (int64_t item = first; item < last; ++item) {
      const int64_t pair = item / blocks, block = item % blocks;
      if (call.narrow)
        attend_block<true>(call, pair / call.heads, pair % call.heads, block, room, out, log_sum);
      else
        attend_block<false>(call, pair / call.heads, pair % call.heads, block, room, out, log_sum);
    }
  });
}

} // namespace deepseek::prompt
