// What every optimizer offers to Python.
#pragma once

#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <optional>
#include <string>

#include "core/observers.h"
#include "core/optimizer_steps.h"
#include "core/run_step.h"
#include "core/zero_grad.h"

namespace torch_freeze {

// Adds `<name>_step`, `<name>_zero_grad` and `<name>`, which stands for the optimizer where steps in backward are
// made.
template <class Optimizer>
void bind_optimizer(pybind11::module_& module, const std::string& name) {
  namespace py = pybind11;
  using namespace py::literals;
  module.def(
      (name + "_step").c_str(),
      [](const py::list& param_groups, const py::dict& state, const py::object& grad_scale,
         const py::object& found_inf, const std::optional<py::list>& done, bool unless_observed) -> py::object {
        if (unless_observed && is_observed()) {
          return py::reinterpret_borrow<py::object>(Py_NotImplemented);
        }
        return StepRunner<Optimizer>::run(param_groups, state, grad_scale, found_inf, done, nullptr, nullptr);
      },
      "param_groups"_a, "state"_a, "grad_scale"_a = py::none(), "found_inf"_a = py::none(), "done"_a = py::none(),
      "unless_observed"_a = false,
      "One step over live param groups and state. Returns None; or, where something is left to stock's form,\n"
      "does nothing and returns it as [(group index, [parameter, ...]), ...], to be passed as `done` once "
      "updated.\n"
      "With `unless_observed`, does nothing and returns NotImplemented where is_observed().");
  module.def(
      (name + "_zero_grad").c_str(),
      [](const py::list& param_groups, const py::dict& state, bool set_to_none) {
        zero_grad(
            Optimizer::kZeroGrad, Optimizer::group_keys(), Optimizer::state_keys(), param_groups, state,
            set_to_none);
      },
      "param_groups"_a, "state"_a, "set_to_none"_a = true,
      "Sets the gradient of every parameter to None, or to zero.");
  module.attr(name.c_str()) = std::shared_ptr<OptimizerSteps>(std::make_shared<StepsOf<Optimizer>>());
}

}  // namespace torch_freeze
