// The best keys of each query by radix select: the bits of the K-th best score are found digit by digit among the keys
// that agree in all digits before. Of equal scores, those with the smaller index.

#include "visible.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cstring>
#include <optional>
#include <vector>

namespace deepseek {

namespace {

constexpr int DIGIT = 11; // bits: three digits of 32 bits, the last of 10
constexpr uint32_t SIGN = 1u << 31, INFINITE = 0xFF800000u; // +infinity in this order

// An integer of the same order: -0 equals 0, NaN is +infinity.
inline uint32_t rank_of(float score) {
  uint32_t bits;
  score += 0.0f;
  std::memcpy(&bits, &score, sizeof bits);
  const uint32_t rank = bits ^ (static_cast<uint32_t>(-static_cast<int32_t>(bits >> 31)) | SIGN);
  return score != score ? INFINITE : rank;
}

struct Row {
  std::vector<uint32_t> ranks; // of the keys that are seen
  std::vector<int32_t> keys; // these keys, where a mask leaves some out
  std::vector<uint32_t> alike; // ranks whose first digits are those of the K-th best
};

// The rank of the `top_k`-th best, and how many of those equal to it are selected.
uint32_t least_of(Row& row, int64_t top_k, int64_t& room) {
  row.alike = row.ranks;
  room = top_k;
  uint32_t known = 0;
  for (int shift = 32 - DIGIT; ; shift = std::max(0, shift - DIGIT)) {
    const int bits = shift == 0 ? 32 - 2 * DIGIT : DIGIT;
    const uint32_t most = (1u << bits) - 1;
    std::vector<int32_t> counts(most + 1, 0);
    for (const uint32_t rank : row.alike)
      ++counts[rank >> shift & most];
    uint32_t digit = most;
    while (counts[digit] < room)
      room -= counts[digit--];
    known |= digit << shift;
    if (shift == 0)
      return known;
    size_t kept = 0;
    for (const uint32_t rank : row.alike) {
      row.alike[kept] = rank;
      kept += (rank >> shift & most) == digit;
    }
    row.alike.resize(kept);
  }
}

// The ranks of all keys that are seen, or none if there are no more than `top_k` keys.
void rank_row(const float* scores, int64_t stride, const SeenKeys& seen, int64_t top_k, Row& row) {
  row.ranks.clear();
  row.keys.clear();
  for (int64_t key = seen.first; seen.mask && key < seen.last; ++key)
    if (seen.mask[key * seen.stride])
      row.keys.push_back(static_cast<int32_t>(key));
  const int64_t count = seen.mask ? row.keys.size() : std::max<int64_t>(0, seen.last - seen.first);
  if (count <= top_k)
    return;
  row.ranks.resize(count);
  for (int64_t i = 0; i < count; ++i)
    if (seen.mask)
      row.ranks[i] = rank_of(scores[row.keys[i] * stride]);
    else if (stride == 1)
      row.ranks[i] = rank_of(scores[seen.first + i]);
    else
      row.ranks[i] = rank_of(scores[(seen.first + i) * stride]);
}

void select_row(const float* scores, int64_t stride, const SeenKeys& seen, int64_t top_k, Row& row, int32_t* out) {
  rank_row(scores, stride, seen, top_k, row);
  const auto key_of = [&](int64_t i) { return seen.mask ? row.keys[i] : static_cast<int32_t>(seen.first + i); };
  const int64_t count = row.ranks.size();
  int64_t room, chosen = 0;
  if (!count) { // all of them
    const int64_t all = seen.mask ? row.keys.size() : std::max<int64_t>(0, seen.last - seen.first);
    while (chosen < all) {
      out[chosen] = key_of(chosen);
      ++chosen;
    }
    std::fill(out + all, out + top_k, -1);
    return;
  }
  const uint32_t least = least_of(row, top_k, room);
  for (int64_t i = 0; i < count && chosen < top_k; ++i) {
    const bool equal = row.ranks[i] == least, taken = row.ranks[i] > least || (equal && room > 0);
    room -= equal;
    out[chosen] = key_of(i);
    chosen += taken;
  }
}

at::Tensor topk_select(const at::Tensor& scores, int64_t top_k, const std::optional<at::Tensor>& mask) {
  const int64_t batch = scores.size(0), queries = scores.size(1), keys = scores.size(2);
  const int64_t chosen = std::min(top_k, keys);
  const VisibleKeys visible(mask, queries, keys);
  at::Tensor out = at::empty({batch, queries, chosen}, scores.options().dtype(at::kInt));
  int32_t* to = out.mutable_data_ptr<int32_t>();
  const float* from = scores.const_data_ptr<float>();
  at::parallel_for(0, batch * queries, 4, [&](int64_t begin, int64_t end) {
    Row row;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / queries, query = item % queries;
      const float* own = from + b * scores.stride(0) + query * scores.stride(1);
      select_row(own, scores.stride(2), visible.of(b, query), chosen, row, to + item * chosen);
    }
  });
  return out;
}

} // namespace

TORCH_LIBRARY_IMPL(deepseek_kernels_cpu, CPU, library) {
  library.impl("topk_select", &topk_select);
}

} // namespace deepseek
