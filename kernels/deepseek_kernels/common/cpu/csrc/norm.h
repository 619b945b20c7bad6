// The root-mean-square norm of one row (arXiv 1910.07467).
#pragma once

#include "rows_of_values.h"

namespace deepseek {

// values -> weight * round(values / sqrt(mean(values^2) + eps)): rounded to `dtype`, the values' own, before the weight
// and not after it.
void norm_row(float* values, const float* weight, int64_t count, float eps, c10::ScalarType dtype);

} // namespace deepseek
