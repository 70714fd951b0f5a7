// Square roots with torch's roundings.
#pragma once

#include <cstdint>

namespace torch_freeze {

// Replaces n numbers by their square roots, as torch.sqrt computes them on the CPU: where torch has Intel's MKL,
// with its function, whose last bit differs from the correctly rounded one on some processors.
void torch_sqrt(float* values, int64_t n);
void torch_sqrt(double* values, int64_t n);

// While one lives, torch_sqrt takes no other threads than the one that made it. After torch.set_num_threads, each
// call would else begin a parallel region, within one of ours or not; a whole step took two to three times as
// long.
class TorchSqrtThread {
 public:
  TorchSqrtThread();
  ~TorchSqrtThread();
  TorchSqrtThread(const TorchSqrtThread&) = delete;
  TorchSqrtThread& operator=(const TorchSqrtThread&) = delete;

 private:
  int threads_;  // MKL's number for this thread before
};

}  // namespace torch_freeze
