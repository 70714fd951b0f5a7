// Steps while backward runs: gradients are applied and let go of bucket by bucket, as they arrive.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Stream.h>
#include <c10/core/UndefinedTensorImpl.h>
#include <c10/util/intrusive_ptr.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/utils/pybind.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "core/optimizer_steps.h"

namespace torch_freeze {

class GradientHook;

// Hangs a hook on every parameter of an optimizer, frozen ones too, and makes the part of a step that can be made
// before backward is over. An iteration is what lies between two steps; step() makes what is left of it.
//
// The hooks run on autograd's threads, without the GIL: they note what has arrived, and only a full bucket takes
// the GIL and walks the optimizer's live lists. Where both are held, the GIL is taken before the mutex.
class BackwardStep : public std::enable_shared_from_this<BackwardStep> {
 public:
  // `optimizer` is a weak reference. Without `bucket_bytes`, a tenth of the trainable bytes, and no more than
  // a cache holds. `clip_value` bounds every element of a gradient before it is applied.
  BackwardStep(
      pybind11::object optimizer, std::shared_ptr<OptimizerSteps> steps, std::optional<int64_t> bucket_bytes,
      std::optional<double> clip_value);
  BackwardStep(const BackwardStep&) = delete;
  BackwardStep& operator=(const BackwardStep&) = delete;
  ~BackwardStep();

  // Hangs a hook on every parameter that has none of this optimizer's; on all of them or on none.
  void attach(const pybind11::list& param_groups);
  // Throws where what step() is about to make would not be one step with what backward has made; clips what is
  // left.
  void check_step(
      const pybind11::list& param_groups, const pybind11::object& grad_scale, const pybind11::object& found_inf);
  // Lets go of all gradients and begins the next iteration.
  void end_step(const pybind11::list& param_groups);
  // Throws where gradients are to be discarded of which some have been applied, or to be kept as zeros.
  void check_zero_grad(bool set_to_none);
  // Throws where backward has made a part of a step: `function` wants to save or to load what lies between two.
  void check_between_steps(const std::string& function);
  // Takes the hooks off; what they have not applied stays in `.grad`.
  void close();

  int64_t bucket_bytes();

  // Throws where another optimizer steps one of these parameters in backward. `first` is the first group's number.
  static void check_free(const pybind11::list& param_groups, int32_t first);

 private:
  friend class GradientHook;

  struct Arrived {
    c10::TensorImpl* param;  // to compare with, never to follow: it may be gone
    // To compare with too. Not a pointer alone: a gradient made once this one is gone could lie at its address.
    c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl> grad;
    uint32_t version;  // of the gradient
    int64_t bytes;
    int32_t group;
    Py_ssize_t position;  // in the group's list
    std::optional<c10::Stream> stream;

    bool is(const at::Tensor& other) const { return grad._unsafe_get_target() == other.unsafeGetTensorImpl(); }
  };

  // Names for error messages.
  std::string method(const std::string& name) const;
  std::string constructor() const;
  void arrive(GradientHook& hook, const at::Tensor& param);
  void find_all_places();
  void find_places(const pybind11::list& param_groups);
  void apply(std::vector<Arrived> due);
  void apply_in(const pybind11::object& optimizer, std::vector<Arrived>& due);
  void clip(const std::vector<torch::autograd::AutogradMeta*>& metas) const;
  void check_applied(const pybind11::list& param_groups) const;
  at::Tensor make_placeholder(const at::Tensor& gone);
  at::Tensor take_placeholder();
  static void check_free(const GradientHook* hook, int32_t group, Py_ssize_t position);
  void begin_iteration();
  void note_backward();
  bool has_failed() const;
  void forget(GradientHook* hook);

  pybind11::object optimizer_;
  const std::shared_ptr<OptimizerSteps> steps_;
  std::optional<int64_t> fixed_bucket_;
  std::optional<double> clip_value_;
  std::atomic<bool> closed_{false};
  std::atomic<int> running_{0};                           // hooks under way
  std::vector<std::pair<at::Tensor, uint32_t>> numbers_;  // of placeholders, as they were made; of the GIL

  std::mutex mutex_;  // of all below
  std::unordered_set<GradientHook*> hooks_;
  std::vector<Arrived> pending_;
  int64_t pending_bytes_ = 0;
  int64_t bucket_ = 0;
  uint64_t iteration_ = 1;
  bool begun_ = false;                  // every parameter's place has been found
  bool fired_ = false;                  // a gradient has arrived
  bool may_discard_ = false;            // something was refused, and zero_grad() is the way out
  std::string refusal_;                 // why the iteration cannot become a step
  int task_ = -1;                       // the last backward that brought a gradient
  int unfinished_ = 0;                  // backwards that brought a gradient and have not ended well
  int64_t applied_ = 0;                 // how many parameters' gradients have been
  std::unique_ptr<UsedOptions> used_;   // by what has been applied
  std::optional<Arrived> placeholder_;  // stands for gradients that have all been applied
};

// Whether a C++ hook hangs on the parameter's gradient accumulator, as DistributedDataParallel's reducer puts
// there.
bool has_accumulator_hook(const at::Tensor& param);

void bind_backward_step(pybind11::module_& module);

}  // namespace torch_freeze
