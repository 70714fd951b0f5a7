// What the core has to know of SGD, and its bindings.
#include "optim/sgd.h"

#include <torch/csrc/utils/pybind.h>

#include <array>

#include "core/optimizer_base.h"
#include "core/run_step.h"
#include "optim/bind_optimizer.h"
#include "optim/bindings.h"

namespace torch_freeze {
namespace {

namespace py = pybind11;
using namespace py::literals;

struct Sgd : OptimizerBase<Sgd> {
  static constexpr const char* kClass = "FrozenAwareSGD";
  static constexpr const char* kStep = "FrozenAwareSGD.step";
  static constexpr const char* kZeroGrad = "FrozenAwareSGD.zero_grad";
  static constexpr const char* kBuffersName = "momentum buffers";
  using Formula = SgdFormula;

  // In the order in which torch.optim.SGD enters them.
  enum Key : size_t {
    kParams,
    kLr,
    kMomentum,
    kDampening,
    kWeightDecay,
    kNesterov,
    kMaximize,
    kForeach,
    kDifferentiable,
    kFused
  };
  static constexpr std::array kOptions{"params",   "lr",       "momentum", "dampening",      "weight_decay",
                                       "nesterov", "maximize", "foreach",  "differentiable", "fused"};
  static constexpr std::array kOwnOptions{"frozen_momentum", "momentum_dtype", "momentum_seed"};
  static constexpr std::array kState{"momentum_buffer"};
  static constexpr const char* kStale = "momentum_stale";

  static SgdGroup read(const GroupReader& reader) {
    SgdGroup group;
    group.momentum = reader.number(kMomentum);
    group.undamped = reader.one_minus(kDampening);
    group.weight_decay = reader.number(kWeightDecay);
    group.nesterov = reader.flag(kNesterov);
    group.maximize = reader.flag(kMaximize);
    return group;
  }
  static int buffers(const SgdGroup& group) { return group.momentum != 0 ? 1 : 0; }

  // Stock's own implementation is asked for, or a derivative that only its separate operators have.
  static bool wants_stock_form(const GroupReader& reader) {
    const bool kernels = reader.item(kFused) == Py_None ? reader.item(kForeach) == Py_None : reader.flag(kFused);
    return !kernels || reader.flag(kDifferentiable) || reader.wants_gradient(kLr) ||
           reader.wants_gradient(kWeightDecay);
  }

  static const char* difference(const SgdGroup& a, const SgdGroup& b) {
    return !same_number(a.momentum, b.momentum)           ? "momentum"
           : !same_number(a.undamped, b.undamped)         ? "dampening"
           : !same_number(a.weight_decay, b.weight_decay) ? "weight_decay"
           : a.nesterov != b.nesterov                     ? "nesterov"
           : a.maximize != b.maximize                     ? "maximize"
                                                          : nullptr;
  }
};

}  // namespace

void bind_sgd(py::module_& module) { bind_optimizer<Sgd>(module, "sgd"); }

}  // namespace torch_freeze
