// The keys that queries see, of a mask as common/masks.py describes it but additive ones.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>
#include <utility>

namespace deepseek {

// Where the keys that a mask lets a query see begin and end: what is outside is not read. Both are 0 if there are none.
inline std::pair<int32_t, int32_t> ends_of(const bool* mask, int64_t stride, int64_t keys) {
  int64_t first = 0, last = keys;
  while (last > 0 && !mask[(last - 1) * stride])
    --last;
  while (first < last && !mask[first * stride])
    ++first;
  return {static_cast<int32_t>(first), static_cast<int32_t>(last)};
}

// From `first` to `last` - 1, and of those what `mask` lets a query see, if there is one.
struct SeenKeys {
  int64_t first, last;
  const bool* mask;
  int64_t stride;
  bool at(int64_t key) const {
    return key >= first && key < last && (!mask || mask[key * stride]);
  }
};

class VisibleKeys {
 public:
  // `mask`: none (causal), spans [batch, queries, 2] or bool [batch, queries, keys], expanded.
  VisibleKeys(const std::optional<at::Tensor>& mask, int64_t queries, int64_t keys)
      : queries_(queries), keys_(keys), spans_(mask && mask->scalar_type() == at::kInt) {
    if (mask)
      mask_ = spans_ ? mask->contiguous() : *mask;
  }

  SeenKeys of(int64_t b, int64_t query) const {
    if (!mask_.defined())
      return {0, within(keys_ - queries_ + query + 1), nullptr, 0};
    if (spans_) {
      const int32_t* span = mask_.const_data_ptr<int32_t>() + 2 * (b * queries_ + query);
      return {within(span[0]), within(span[1]), nullptr, 0};
    }
    const bool* row = mask_.const_data_ptr<bool>() + b * mask_.stride(0) + query * mask_.stride(1);
    return {0, keys_, row, mask_.stride(2)};
  }

 private:
  int64_t within(int64_t at) const {
    return std::clamp<int64_t>(at, 0, keys_);
  }

  int64_t queries_, keys_;
  bool spans_;
  at::Tensor mask_;
};

} // namespace deepseek
