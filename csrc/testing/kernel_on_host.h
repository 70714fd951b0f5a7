// The CUDA kernel's body on the CPU, so that its tests need no GPU, and the CPU's kernel to compare it with.
#pragma once

#include <pybind11/pybind11.h>

namespace torch_freeze {

// Adds the private functions `_kernel_on_host_…` and `_cpu_kernel_step`.
void bind_kernel_on_host(pybind11::module_& module);

}  // namespace torch_freeze
