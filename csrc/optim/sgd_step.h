// One step of SGD over an optimizer's live param_groups and state.
#pragma once

#include <c10/core/Device.h>
#include <torch/csrc/utils/pybind.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "optim/sgd_math.h"

namespace torch_freeze {

// Updates every trainable parameter and drops the gradients of the frozen ones; returns None. Where there is
// something that no kernel covers, nothing at all is done and that is returned, as
// [(group index, [parameter, …]), …]: the caller updates it and calls again with that list as `done`.
// With `unless_observed`, does nothing and returns NotImplemented where is_observed().
pybind11::object sgd_step(
    const pybind11::list& param_groups, const pybind11::dict& state, const pybind11::object& grad_scale,
    const pybind11::object& found_inf, const std::optional<pybind11::list>& done, bool unless_observed);

// The hyper-parameters that a part of a step was made with, for each group.
struct UsedGroup {
  bool used = false;
  SgdGroup group;
  const void* lr = nullptr;  // the tensor, where it is one on a device
  uint32_t lr_version = 0;
};
using UsedGroups = std::vector<UsedGroup>;

// Some of an optimizer's parameters: of each group those at `positions` of its list, in order.
struct Selection {
  struct Part {
    int32_t group;
    pybind11::list params;
    std::vector<Py_ssize_t> positions;
  };
  std::vector<Part> parts;
};

// sgd_step() for a selection. Notes in `used` what it used, and throws where an earlier part of the step has used
// something else.
pybind11::object sgd_step_part(
    const pybind11::list& param_groups, const pybind11::dict& state, const Selection& selection, UsedGroups& used,
    const std::optional<pybind11::list>& done);

// Throws where a group's hyper-parameters are not those of `used` any more.
void check_unchanged(const pybind11::list& param_groups, const UsedGroups& used);

// `.grad = None`, or zero where `set_to_none` is false, for every parameter. Where a group's frozen_momentum is
// "drop", lets go of what is frozen too: before a forward pass, rather than after the backward that follows.
void zero_grad(const pybind11::list& param_groups, const pybind11::dict& state, bool set_to_none);

// Whether what is launched on the device's current stream is recorded for a CUDA graph. Makes a context on a
// device that has none.
bool is_capturing(c10::Device device);

// Whether a profiler or another observer wants to hear of each step.
bool is_observed();

}  // namespace torch_freeze
