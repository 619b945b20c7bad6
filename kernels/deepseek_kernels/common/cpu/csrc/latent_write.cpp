// Norm of the latent, rotation of the shared key, and both into the cache.

#include "norm.h"
#include "packing.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <vector>

namespace deepseek {

namespace {

// Interleaved pairs; each product and each sum is rounded, as PyTorch's are.
void rotate(float* values, const float* cos, const float* sin, int64_t pairs) {
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const float even = values[2 * pair], odd = values[2 * pair + 1];
    values[2 * pair] = even * cos[pair] - odd * sin[pair];
    values[2 * pair + 1] = even * sin[pair] + odd * cos[pair];
  }
}

// Where tokens go: row b of the batch, or pages that belong to any row.
struct Slots {
  const at::Tensor& buffer;
  bool paged;

  // Returns the number of a token's place, -1 for one that is not stored.
  int64_t place(int64_t row, int64_t slot) const {
    const int64_t size = buffer.size(1), limit = size * (paged ? buffer.size(0) : 1);
    if (slot < 0 || slot >= limit)
      return -1;
    return paged ? slot : row * size + slot;
  }

  char* at(int64_t place) const {
    const int64_t size = buffer.size(1);
    const int64_t element = place / size * buffer.stride(0) + place % size * buffer.stride(1);
    return static_cast<char*>(buffer.mutable_data_ptr()) + element * buffer.element_size();
  }
};

void latent_write(
    const at::Tensor& kv,
    const at::Tensor& weight,
    double eps,
    const at::Tensor& cos,
    const at::Tensor& sin,
    at::Tensor buffer,
    const at::Tensor& slots,
    bool paged) {
  const int64_t batch = kv.size(0), tokens = kv.size(1), width = kv.size(2), latent = weight.numel();
  const int64_t pairs = (width - latent) / 2;
  const at::Tensor from = kv.contiguous(), cosines = cos.contiguous(), sines = sin.contiguous();
  const at::Tensor places = slots.contiguous();
  const auto dtype = kv.scalar_type(), stored = buffer.scalar_type();
  const auto normed = c10::promoteTypes(dtype, weight.scalar_type());
  std::vector<float> factors(latent);
  load_row(weight.scalar_type(), weight.contiguous().const_data_ptr(), latent, factors.data());
  const Slots target{buffer, paged};
  if (!buffer.numel())
    return;
  if (!buffer.is_inference())
    buffer.unsafeGetTensorImpl()->bump_version(); // autograd then finds that what it saved has changed
  // A place belongs to one thread: of two tokens with one slot the later one stays, whole.
  const int64_t count = batch * tokens, shares = std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), count / 8));
  at::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> values(width);
    for (int64_t index = 0; index < count; ++index) {
      const int64_t row = index / tokens, token = index % tokens;
      const auto of_row = [&](const at::Tensor& shared) { return (shared.size(0) == 1 ? 0 : row) * tokens + token; };
      const int64_t place = target.place(row, places.const_data_ptr<int64_t>()[of_row(places)]);
      if (place < 0 || place % shares < begin || place % shares >= end)
        continue;
      char* to = target.at(place);
      const char* bytes = static_cast<const char*>(from.const_data_ptr()) + index * width * from.element_size();
      load_row(dtype, bytes, width, values.data());
      norm_row(values.data(), factors.data(), latent, static_cast<float>(eps), dtype);
      round_row(normed, values.data(), latent);
      rotate(
          values.data() + latent,
          cosines.const_data_ptr<float>() + of_row(cosines) * pairs,
          sines.const_data_ptr<float>() + of_row(sines) * pairs,
          pairs);
      round_row(dtype, values.data(), width);
      if (stored == at::kByte)
        pack_row(values.data(), latent, width - latent, reinterpret_cast<uint8_t*>(to));
      else
        store_row(stored, values.data(), width, to);
    }
  });
}

} // namespace

TORCH_LIBRARY_IMPL(deepseek_kernels_cpu, CPU, library) {
  library.impl("latent_write", &latent_write);
}

} // namespace deepseek
