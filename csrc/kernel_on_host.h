// The CUDA kernel's body on the CPU, so that its tests need no GPU.
#pragma once

#include <pybind11/pybind11.h>

namespace torch_freeze {

// Adds the private functions `_kernel_on_host_…`.
void bind_kernel_on_host(pybind11::module_& module);

}  // namespace torch_freeze
