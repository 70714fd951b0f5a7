#include <torch/csrc/utils/pybind.h>

#include <memory>

#include "core/backward_step.h"
#include "core/observers.h"
#include "core/optimizer_steps.h"
#include "optim/bindings.h"

namespace py = pybind11;
using namespace py::literals;

PYBIND11_MODULE(_C, module) {
  module.doc() = "The C++ side of torch_freeze.";
  module.def("is_observed", &torch_freeze::is_observed, "Whether a profiler wants to hear of each step.");
  module.def(
      "has_accumulator_hook", &torch_freeze::has_accumulator_hook, "param"_a,
      "Whether a C++ hook hangs on the parameter's gradient accumulator, as the one of "
      "DistributedDataParallel's reducer.");
  py::class_<torch_freeze::OptimizerSteps, std::shared_ptr<torch_freeze::OptimizerSteps>>(
      module, "OptimizerSteps", "How an optimizer makes a part of its step, for BackwardStep.");
  torch_freeze::bind_backward_step(module);
  torch_freeze::bind_sgd(module);
  torch_freeze::bind_adam(module);
}
