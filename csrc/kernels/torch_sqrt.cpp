#include "kernels/torch_sqrt.h"

#include <cmath>

// Of MKL, which torch's library exports where it is built with it; else null.
extern "C" {
__attribute__((weak)) void vmsSqrt(int n, const float* a, float* r, int64_t mode);
__attribute__((weak)) void vmdSqrt(int n, const double* a, double* r, int64_t mode);
__attribute__((weak)) int MKL_Set_Num_Threads_Local(int threads);
}

namespace torch_freeze {
namespace {

// High accuracy, subnormal numbers kept, errors ignored.
constexpr int64_t kMode = 0x2 | 0x140000 | 0x100;

template <class T, class Function>
void apply(Function* function, T* values, int64_t n) {
  if (function != nullptr) {
    function(static_cast<int>(n), values, values, kMode);
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    values[i] = std::sqrt(values[i]);
  }
}

}  // namespace

TorchSqrtThread::TorchSqrtThread()
    : threads_(MKL_Set_Num_Threads_Local == nullptr ? 0 : MKL_Set_Num_Threads_Local(1)) {}

TorchSqrtThread::~TorchSqrtThread() {
  if (MKL_Set_Num_Threads_Local != nullptr) {
    MKL_Set_Num_Threads_Local(threads_);
  }
}

void torch_sqrt(float* values, int64_t n) { apply(vmsSqrt, values, n); }

void torch_sqrt(double* values, int64_t n) { apply(vmdSqrt, values, n); }

}  // namespace torch_freeze
