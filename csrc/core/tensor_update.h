// What the walk over Python's objects passes to the kernels: plain memory, neither Python objects nor tensors.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>

#include <cstdint>

namespace torch_freeze {

// What an optimizer's state holds for one parameter: at most kBuffers buffers of the parameter's shape, and a
// count of its updates or none.
template <int kBuffers_, bool kCounts_>
struct StateLayout {
  static constexpr int kBuffers = kBuffers_;
  static constexpr bool kCounts = kCounts_;
  static constexpr int kSlots = kBuffers + (kCounts ? 1 : 0);  // the count comes last
};

namespace detail {
template <bool kCounts>
struct Count {};
template <>
struct Count<true> {
  float* count;  // of the updates before this one
  bool count_on_host;
};
}  // namespace detail

// The update of one parameter. The arrays hold `numel` elements each in the same order: dense, no gaps.
template <class Layout>
struct TensorUpdate : detail::Count<Layout::kCounts> {
  void* param;
  void* grad;
  void* buffer[Layout::kBuffers];  // of the optimizer's state; null where the group has none
  int64_t numel;
  int32_t group;        // index into UpdateBatch::groups
  uint32_t index : 31;  // of the parameter in its group's list
  uint32_t fresh : 1;   // buffers and count hold nothing yet, and count as zero
};
static_assert(sizeof(TensorUpdate<StateLayout<1, false>>) == 40, "the walk writes one per parameter");

// What all tensors of one launch have in common.
struct BatchKind {
  c10::Device device = c10::kCPU;
  c10::ScalarType param_type = c10::kFloat;
  c10::ScalarType grad_type = c10::kFloat;
  c10::ScalarType buffer_type = c10::kFloat;
  bool stochastic = false;  // buffers are bfloat16 and rounded stochastically: see rounding_bits()
};

// Everything one launch covers: any number of param groups. No two tensors that it writes overlap.
template <class Formula>
struct UpdateBatch {
  using Group = typename Formula::Group;
  using Update = TensorUpdate<typename Formula::State>;

  BatchKind kind;
  const Update* updates = nullptr;
  int64_t count = 0;
  int64_t numel = 0;  // of all updates together
  const Group* groups = nullptr;
  int64_t group_count = 0;
  // One float each on the kind's device, or null without a GradScaler. Gradients are divided by *grad_scale, and
  // left so; where *found_inf is not 0 nothing is written.
  const float* grad_scale = nullptr;
  const float* found_inf = nullptr;
};

// Updates everything that a batch covers. kernels/launch_cpu.h and kernels/launch_cuda.cuh define these, and files
// of each optimizer compile them for its formula.
template <class Formula>
void launch_cpu(const UpdateBatch<Formula>& batch);
template <class Formula>
void launch_cuda(const UpdateBatch<Formula>& batch);

// A learning rate as a number, or on the tensors' own device (one float, or one double where `device_is_double`),
// where it is read, so that a step captured in a CUDA graph follows it.
struct LearningRate {
  double number = 0;  // where `device` is null
  const void* device = nullptr;
  bool device_is_double = false;
};

// What the hyper-parameters of every param group begin with.
struct GroupOptions {
  LearningRate lr;
  uint64_t rounding_seed = 0;  // another one for every group and step; where buffers are rounded stochastically
};

}  // namespace torch_freeze
