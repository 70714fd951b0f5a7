#include <torch/csrc/utils/pybind.h>

#include "core/backward_step.h"
#include "testing/kernel_on_host.h"
#include "optim/sgd_step.h"

namespace py = pybind11;
using namespace py::literals;

PYBIND11_MODULE(_C, module) {
  module.doc() = "The C++ side of torch_freeze.";
  module.def(
      "sgd_step", &torch_freeze::sgd_step, "param_groups"_a, "state"_a, "grad_scale"_a = py::none(),
      "found_inf"_a = py::none(), "done"_a = py::none(), "unless_observed"_a = false,
      "One SGD step over live param groups and state. Returns None; or, where something is left to stock's "
      "form,\ndoes nothing and returns it as [(group index, [parameter, ...]), ...], to be passed as `done` "
      "once updated.");
  module.def(
      "zero_grad", &torch_freeze::zero_grad, "param_groups"_a, "state"_a, "set_to_none"_a = true,
      "Sets the gradient of every parameter to None, or to zero.");
  module.def("is_observed", &torch_freeze::is_observed, "Whether a profiler wants to hear of each step.");
  module.def(
      "has_accumulator_hook", &torch_freeze::has_accumulator_hook, "param"_a,
      "Whether a C++ hook hangs on the parameter's gradient accumulator, as the one of "
      "DistributedDataParallel's reducer.");
  torch_freeze::bind_backward_step(module);
  torch_freeze::bind_kernel_on_host(module);
}
