// Square roots with torch's roundings.
#pragma once

#include <cstdint>

namespace torch_freeze {

// Replaces n numbers by their square roots, as torch.sqrt computes them on the CPU: where torch has Intel's MKL,
// with its function, whose last bit differs from the correctly rounded one on some processors.
void torch_sqrt(float* values, int64_t n);
void torch_sqrt(double* values, int64_t n);

}  // namespace torch_freeze
