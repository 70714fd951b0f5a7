#pragma once

#include <torch/csrc/utils/pybind.h>

#include "core/group_reader.h"
#include "core/state_policy.h"

namespace torch_freeze {

// Sets `.grad` of every parameter to None, or to zero if `set_to_none` is false. If a group drops the state of
// frozen parameters, that is freed here too, so that it is gone during the next forward pass.
void zero_grad(
    const char* function, const GroupKeys& group_keys, const StateKeys& state_keys,
    const pybind11::list& param_groups, const pybind11::dict& state, bool set_to_none);

}  // namespace torch_freeze
