// The optimizers' bindings: one line for each.
#pragma once

#include <pybind11/pybind11.h>

namespace torch_freeze {

void bind_sgd(pybind11::module_& module);
void bind_adam(pybind11::module_& module);

}  // namespace torch_freeze
