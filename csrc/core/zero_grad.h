#pragma once

#include <torch/csrc/utils/pybind.h>

#include "core/group_reader.h"
#include "core/state_policy.h"

namespace torch_freeze {

// `.grad = None`, or zero where `set_to_none` is false, for every parameter. Where a group drops the state of what
// is frozen, lets go of that too: before a forward pass, rather than after the backward that follows.
void zero_grad(
    const char* function, const GroupKeys& group_keys, const StateKeys& state_keys,
    const pybind11::list& param_groups, const pybind11::dict& state, bool set_to_none);

}  // namespace torch_freeze
