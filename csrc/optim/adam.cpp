// What the core has to know of Adam and AdamW, and their bindings.
#include "optim/adam.h"

#include <c10/core/DefaultDtype.h>
#include <torch/csrc/utils/pybind.h>

#include <array>

#include "core/optimizer_base.h"
#include "core/run_step.h"
#include "optim/bind_optimizer.h"
#include "optim/bindings.h"

namespace torch_freeze {
namespace {

namespace py = pybind11;

template <bool kDecoupled>
struct Adam : OptimizerBase<Adam<kDecoupled>> {
  static constexpr const char* kClass = kDecoupled ? "FrozenAwareAdamW" : "FrozenAwareAdam";
  static constexpr const char* kStep = kDecoupled ? "FrozenAwareAdamW.step" : "FrozenAwareAdam.step";
  static constexpr const char* kZeroGrad = kDecoupled ? "FrozenAwareAdamW.zero_grad" : "FrozenAwareAdam.zero_grad";
  using Formula = AdamFormula;

  // In the order in which torch.optim.Adam enters them.
  enum Key : size_t {
    kParams,
    kLr,
    kBetas,
    kEps,
    kWeightDecay,
    kAmsgrad,
    kMaximize,
    kForeach,
    kCapturable,
    kDifferentiable,
    kFused,
    kDecoupledDecay
  };
  static constexpr std::array kOptions{
      "params",  "lr",         "betas",          "eps",   "weight_decay",          "amsgrad", "maximize",
      "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"};
  static constexpr std::array kState{"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step"};

  static AdamGroup read(const GroupReader& reader) {
    AdamGroup group;
    const auto betas = reader.pair(kBetas);
    group.beta1 = betas[0];
    group.beta2 = betas[1];
    group.eps = reader.number(kEps);
    group.weight_decay = reader.number(kWeightDecay);
    group.amsgrad = reader.flag(kAmsgrad);
    group.maximize = reader.flag(kMaximize);
    group.decoupled = reader.flag(kDecoupledDecay);
    group.fused = reader.flag(kFused);
    const auto step_type = reader.computes_in(kLr);
    const auto decay_type = reader.computes_in(kWeightDecay);
    group.step_in_float = step_type == c10::kFloat;
    group.decay_in_float = step_type != c10::kDouble && decay_type != c10::kDouble &&
                           (step_type == c10::kFloat || decay_type == c10::kFloat);
    return group;
  }
  static int buffers(const AdamGroup& group) { return group.amsgrad ? 3 : 2; }
  static bool count_on_device(const GroupReader& reader) {
    return reader.flag(kCapturable) || reader.flag(kFused);
  }
  static bool count_in_double(const GroupReader& reader) {
    return c10::get_default_dtype() == caffe2::TypeMeta::Make<double>() && !reader.flag(kFused);
  }

  // Stock's own implementation is asked for, or what only its separate operators have: derivatives, betas with a
  // precision of their own, and a rate or decay that NumPy computes in float16.
  static bool wants_stock_form(const GroupReader& reader) {
    const bool kernels = reader.item(kFused) == Py_None ? reader.item(kForeach) == Py_None : reader.flag(kFused);
    return !kernels || !reader.is_plain_pair(kBetas) || reader.flag(kDifferentiable) ||
           reader.wants_gradient(kLr) || reader.wants_gradient(kWeightDecay) ||
           reader.computes_in(kLr) == c10::kHalf || reader.computes_in(kWeightDecay) == c10::kHalf;
  }

  static const char* difference(const AdamGroup& a, const AdamGroup& b) {
    return !same_number(a.beta1, b.beta1) || !same_number(a.beta2, b.beta2) ? "betas"
           : !same_number(a.eps, b.eps)                                     ? "eps"
           : !same_number(a.weight_decay, b.weight_decay)                   ? "weight_decay"
           : a.amsgrad != b.amsgrad                                         ? "amsgrad"
           : a.maximize != b.maximize                                       ? "maximize"
           : a.decoupled != b.decoupled                                     ? "decoupled_weight_decay"
                                                                            : nullptr;
  }
};

}  // namespace

void bind_adam(py::module_& module) {
  bind_optimizer<Adam<false>>(module, "adam");
  bind_optimizer<Adam<true>>(module, "adamw");
}

}  // namespace torch_freeze
