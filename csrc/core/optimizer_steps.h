// What stepping in backward has to know of an optimizer: how to make a part of its step.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <optional>
#include <vector>

namespace torch_freeze {

// Some of an optimizer's parameters: of each group those at `positions` of its list, in order.
struct Selection {
  struct Part {
    int32_t group;
    pybind11::list params;
    std::vector<Py_ssize_t> positions;
  };
  std::vector<Part> parts;
};

// The hyper-parameters, for each group, with which the parts of one step were made.
class UsedOptions {
 public:
  virtual ~UsedOptions() = default;
  virtual std::unique_ptr<UsedOptions> copy() const = 0;
  // Takes over what `other` has used.
  virtual void merge(const UsedOptions& other) = 0;
};

class OptimizerSteps {
 public:
  virtual ~OptimizerSteps() = default;
  // The Python class, for error messages.
  virtual const char* name() const = 0;
  virtual std::unique_ptr<UsedOptions> nothing_used() const = 0;
  // Makes the step for a selection and records in `used` with which options. Throws if an earlier part of the step
  // was made with others. Returns what StepRunner::run() does.
  virtual pybind11::object step_part(
      const pybind11::list& param_groups, const pybind11::dict& state, const Selection& selection,
      UsedOptions& used, const std::optional<pybind11::list>& done) const = 0;
  // Throws if a group's options have changed since.
  virtual void check_unchanged(const pybind11::list& param_groups, const UsedOptions& used) const = 0;
};

}  // namespace torch_freeze
