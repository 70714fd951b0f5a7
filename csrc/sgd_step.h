// One step of SGD over an optimizer's live param_groups and state.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <optional>

namespace torch_freeze {

// Updates every trainable parameter and drops the gradients of the frozen ones; returns None. Where there is
// something that no kernel covers, nothing at all is done and that is returned, as
// [(group index, [parameter, …]), …]: the caller updates it and calls again with that list as `done`.
// With `unless_observed`, does nothing and returns NotImplemented where is_observed().
pybind11::object sgd_step(
    const pybind11::list& param_groups, const pybind11::dict& state, const pybind11::object& grad_scale,
    const pybind11::object& found_inf, const std::optional<pybind11::list>& done, bool unless_observed);

// `.grad = None`, or zero where `set_to_none` is false, for every parameter.
void zero_grad(const pybind11::list& param_groups, bool set_to_none);

// Whether a profiler or another observer wants to hear of each step.
bool is_observed();

}  // namespace torch_freeze
