// What passes from the walk over Python's objects to the kernels: plain memory, no Python, no tensors.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>

#include <cstdint>

#include "optim/sgd_math.h"

namespace torch_freeze {

// One parameter's share of a step. The three arrays hold `numel` elements each in the same order: dense, no gaps.
struct TensorUpdate {
  void* param;
  void* grad;
  void* momentum;  // null where the group has no momentum
  int64_t numel;
  int32_t group;        // index into UpdateBatch::groups
  uint32_t index : 31;  // of the parameter in its group's list
  uint32_t fresh : 1;   // the momentum buffer holds nothing yet
};
static_assert(sizeof(TensorUpdate) == 40, "the walk writes one per parameter");

// Everything one launch covers: one device, one triple of dtypes, any number of param groups. No two tensors
// that it writes overlap.
struct UpdateBatch {
  c10::Device device = c10::kCPU;
  c10::ScalarType param_type = c10::kFloat;
  c10::ScalarType grad_type = c10::kFloat;
  c10::ScalarType momentum_type = c10::kFloat;
  const TensorUpdate* updates = nullptr;
  int64_t count = 0;
  int64_t numel = 0;  // of all updates together
  const SgdGroup* groups = nullptr;
  int64_t group_count = 0;
  bool stochastic = false;  // momentum is bfloat16 and rounded stochastically: see rounding_bits()
  // One float each on `device`, or null without a GradScaler. Gradients are divided by *grad_scale, and left so;
  // where *found_inf is not 0 nothing is written.
  const float* grad_scale = nullptr;
  const float* found_inf = nullptr;
};

void sgd_step_cpu(const UpdateBatch& batch);
void sgd_step_cuda(const UpdateBatch& batch);

}  // namespace torch_freeze
