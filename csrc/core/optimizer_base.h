// What core/run_step.h asks of an optimizer and most of them answer alike.
#pragma once

#include <array>

#include "core/group_reader.h"
#include "core/state_policy.h"

namespace torch_freeze {

// Of `class Optimizer : OptimizerBase<Optimizer>`, which adds
//   kOptions   the keys of its param groups, "params" first, in the order in which torch's optimizer enters them
//   kState     the keys of a parameter's state: the buffers, then the count
// and hides by its own what it does otherwise.
template <class Optimizer>
struct OptimizerBase {
  static constexpr const char* kBuffersName = "moments";
  static constexpr std::array kOwnOptions{"frozen_state", "moment_dtype", "moment_seed"};
  static constexpr const char* kStale = "state_stale";

  static const GroupKeys& group_keys() {
    static const GroupKeys keys(Optimizer::kStep, Optimizer::kOptions, Optimizer::kOwnOptions);
    return keys;
  }
  static const StateKeys& state_keys() {
    static const StateKeys keys(
        Optimizer::kState, Optimizer::kStale, Optimizer::kOwnOptions[GroupKeys::kBufferDtype]);
    return keys;
  }
  template <class Group>
  static int buffers(const Group&) {
    return Optimizer::Formula::kBuffers;
  }
  // No implementation in torch, or none that anyone could ask for.
  static bool wants_stock_form(const GroupReader&) { return false; }
};

}  // namespace torch_freeze
