// One step of an optimizer over its live param_groups and state.
//
// An Optimizer is a class with
//   kClass, kStep, kZeroGrad   the names of the Python class and of two of its methods, for error messages
//   kBuffersName               what its state holds, likewise
//   Formula                    see kernels/tile_formula.h; Formula::Group holds a group's hyper-parameters
//   kLr                        the index of the learning rate in kOptions
//   read(reader)               a group's hyper-parameters, short of learning rate and rounding seed
//   buffers(group)             how many buffers the state holds for each of its parameters
//   count_on_device(reader)    where updates are counted: whether a new count lies on the parameter's device
//   wants_stock_form(reader)   whether torch's own implementation is asked for
//   difference(a, b)           the name of the first option that differs, or null
//   group_keys(), state_keys()
// core/optimizer_base.h has what most of them have in common.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "core/group_reader.h"
#include "core/observers.h"
#include "core/optimizer_steps.h"
#include "core/param_walk.h"
#include "core/state_policy.h"
#include "core/tensor_update.h"

namespace torch_freeze {

// From this many elements on, other Python threads may run while the CPU computes.
constexpr int64_t kReleaseGilNumel = 1 << 20;

inline bool same_number(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }

// The hyper-parameters that a part of a step was made with.
template <class Group>
struct UsedGroup {
  bool used = false;
  Group group;
  const void* lr = nullptr;  // the tensor, where it is one on a device
  uint32_t lr_version = 0;
};

template <class Group>
class UsedGroups : public UsedOptions {
 public:
  std::unique_ptr<UsedOptions> copy() const override { return std::make_unique<UsedGroups>(*this); }
  void merge(const UsedOptions& other) override {
    const auto& others = static_cast<const UsedGroups&>(other).groups;
    groups.resize(std::max(groups.size(), others.size()));
    for (size_t i = 0; i < others.size(); ++i) {
      groups[i] = others[i].used ? others[i] : groups[i];
    }
  }
  std::vector<UsedGroup<Group>> groups;
};

template <class Optimizer>
class StepRunner {
 public:
  using Formula = typename Optimizer::Formula;
  using Group = typename Formula::Group;
  using State = typename Formula::State;
  using Batch = UpdateBatch<Formula>;
  using Used = UsedGroups<Group>;

  // Updates every trainable parameter, or those of `selection`, and drops the gradients of the frozen ones;
  // returns None. Where there is something that no kernel covers, nothing at all is done and that is returned, as
  // [(group index, [parameter, …]), …]: the caller updates it and calls again with that list as `done`.
  static pybind11::object run(
      const pybind11::list& param_groups, const pybind11::dict& state, const pybind11::object& grad_scale,
      const pybind11::object& found_inf, const std::optional<pybind11::list>& done, const Selection* selection,
      Used* used) {
    static thread_local StepRunner shared;
    static thread_local bool busy = false;
    if (busy) {
      // A step within a step: freeing a gradient ran user code that steps.
      StepRunner own;
      return own.step(param_groups, state, grad_scale, found_inf, done, selection, used);
    }
    struct Guard {
      Guard() { busy = true; }
      ~Guard() {
        shared.walk_.reset(nullptr);  // holds no tensor until the next step
        shared.device_lrs_.clear();
        shared.params_.clear();
        shared.seeds_.clear();
        busy = false;
      }
    } guard;
    return shared.step(param_groups, state, grad_scale, found_inf, done, selection, used);
  }

  // Throws where a group's hyper-parameters are not those of `used` any more.
  static void check_unchanged(const pybind11::list& param_groups, const Used& used) {
    check_number_of_groups(param_groups, used);
    for (size_t i = 0; i < used.groups.size(); ++i) {
      if (used.groups[i].used) {
        const GroupReader reader(
            PyList_GET_ITEM(param_groups.ptr(), static_cast<Py_ssize_t>(i)), static_cast<int32_t>(i),
            Optimizer::group_keys());
        const at::Tensor* device_lr = nullptr;
        const auto group = read_group(reader, i, device_lr);
        check_same(used.groups[i], as_used(group, device_lr), i);
      }
    }
  }

  static void check_number_of_groups(const pybind11::list& param_groups, const Used& used) {
    TORCH_CHECK(
        used.groups.size() <= param_groups.size(), Optimizer::kStep, ": there are ", param_groups.size(),
        " param_groups, and were ", used.groups.size(),
        " when backward applied a part of the gradients. Remove groups after step().");
  }

 private:
  pybind11::object step(
      const pybind11::list& param_groups, const pybind11::dict& state, const pybind11::object& grad_scale,
      const pybind11::object& found_inf, const std::optional<pybind11::list>& done, const Selection* selection,
      Used* used) {
    namespace py = pybind11;
    walk_.reset(state.ptr());
    groups_.clear();
    params_.clear();
    policies_.clear();
    seeds_.clear();
    device_lrs_.clear();
    has_device_lr_ = false;
    rounds_stochastically_ = false;
    if (done) {
      walk_.skip(*done);
    }
    read_groups(param_groups, selection, used);
    for (const auto& [params, use] : params_) {
      walk_.add_group(params.ptr(), use);
    }
    if (walk_.has_rest()) {
      return walk_.rest();
    }
    // This comes before anything is read from a device, which a capture does not allow either.
    if (walk_.has_fresh()) {
      refuse_capture(
          [&](const auto& batch) { return walk_.has_fresh(batch); }, Optimizer::kBuffersName,
          " are missing, and would start from zero at every replay. Make a step before the capture, so that they "
          "are there.");
    }
    if (walk_.counts_gpu_on_host()) {
      refuse_capture(
          [](const auto& batch) {
            return std::any_of(batch.updates.begin(), batch.updates.end(), [](const auto& update) {
              return counts_on_host(update);
            });
          },
          "the number of updates is kept on the host, and replays would not count. Use capturable=True.");
    }
    if (rounds_stochastically_) {
      refuse_capture(
          [](const auto& batch) { return batch.kind.stochastic; },
          "every replay would round momentum with the same random bits. Use ",
          Optimizer::state_keys().dtype_option, "=None.");
    }
    // An overflow must leave no trace, not even a new buffer or a count. On a GPU, reading found_inf costs a
    // synchronization, so it is read only if there are buffers to make, which a steady state has not, or counts of
    // the host.
    const bool overlap = walk_.has_overlap();
    if (!found_inf.is_none() && (walk_.has_fresh() || walk_.counts_gpu_on_host()) &&
        scaler_on_device(Optimizer::kStep, found_inf, c10::kCPU).item().toFloat() != 0) {
      walk_.drop_frozen_grads();
    } else {
      walk_.make_fresh_buffers(overlap);
      update(grad_scale, found_inf, overlap);
      walk_.unmark_fresh();
    }
    settle(state, overlap);
    return py::none();
  }

  // Reads all hyper-parameters before the walk, because reading one can run user code, which must not change what
  // has been walked.
  void read_groups(const pybind11::list& param_groups, const Selection* selection, Used* used) {
    namespace py = pybind11;
    const bool intercepted = is_intercepted();
    size_t part = 0;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(param_groups.ptr()); ++i) {
      Group& group = groups_.emplace_back();
      const bool selected =
          selection != nullptr && part < selection->parts.size() && selection->parts[part].group == i;
      if (selection != nullptr && !selected) {
        continue;
      }
      PyObject* const dict = PyList_GET_ITEM(param_groups.ptr(), i);
      const GroupReader reader(dict, static_cast<int32_t>(i), Optimizer::group_keys());
      GroupUse use;
      use.index = static_cast<int32_t>(i);
      use.stock_form = intercepted || Optimizer::wants_stock_form(reader);
      if (!use.stock_form || selected) {
        const at::Tensor* device_lr = nullptr;
        group = read_group(reader, i, device_lr);
        if (device_lr != nullptr) {
          has_device_lr_ = true;
          device_lrs_.resize(i);
          device_lrs_.push_back(*device_lr);
        }
        if (selected) {
          auto& all_used = used->groups;
          all_used.resize(std::max(all_used.size(), static_cast<size_t>(i) + 1));
          const auto now = as_used(group, device_lr);
          if (all_used[i].used) {
            check_same(all_used[i], now, i);
          }
          all_used[i] = now;
        }
        use.buffers = Optimizer::buffers(group);
        if constexpr (State::kCounts) {
          use.count_on_device = Optimizer::count_on_device(reader);
          use.count_in_double = Optimizer::count_in_double(reader);
        }
      }
      if (use.buffers != 0 || use.stock_form) {
        use.buffer_type = reader.buffer_type();
        const bool own_type = use.buffer_type != c10::ScalarType::Undefined;
        const char* const option = Optimizer::state_keys().dtype_option;
        TORCH_CHECK_VALUE(
            !own_type || !use.stock_form, Optimizer::kStep, ": param_groups[", i, "] has a ", option,
            " and asks for stock's own form (foreach, fused=False, differentiable, or a mode that wants to see "
            "every operator), which has none. Set ",
            option, " to None, or foreach and fused.");
        rounds_stochastically_ |= own_type;
        if (selection == nullptr && own_type) {
          seeds_.emplace_back(py::reinterpret_borrow<py::object>(dict), reader.rounding_seed());
        }
      }
      if (const auto policy = reader.frozen_state(); policy != FrozenState::kKeep && selection == nullptr) {
        policies_.emplace_back(params_.size(), policy);
      }
      if (selected) {
        use.positions = selection->parts[part].positions.data();
        params_.emplace_back(selection->parts[part++].params, use);
      } else {
        params_.emplace_back(py::reinterpret_borrow<py::object>(reader.item(0)), use);
      }
    }
    device_lrs_.resize(groups_.size());
  }

  // `device_lr` is the learning rate if it stays on its device, else null.
  static Group read_group(const GroupReader& reader, size_t index, const at::Tensor*& device_lr) {
    LearningRate rate;
    const at::Tensor* lr = reader.tensor(Optimizer::kLr);
    device_lr = nullptr;
    if (lr != nullptr && lr->is_cuda() && (lr->scalar_type() == at::kFloat || lr->scalar_type() == at::kDouble) &&
        holds_its_value(*lr)) {
      device_lr = lr;
      rate.device = lr->const_data_ptr();
      rate.device_is_double = lr->scalar_type() == at::kDouble;
    } else {
      rate.number = reader.number(Optimizer::kLr);
    }
    Group group = Optimizer::read(reader);
    group.lr = rate;
    if (reader.buffer_type() != c10::ScalarType::Undefined) {
      // Two groups may have the same seed, and parameters at the same positions.
      group.rounding_seed = reader.rounding_seed() + (static_cast<uint64_t>(index) << 48);
    }
    return group;
  }

  static UsedGroup<Group> as_used(const Group& group, const at::Tensor* device_lr) {
    UsedGroup<Group> used;
    used.used = true;
    used.group = group;
    if (device_lr != nullptr) {
      used.lr = device_lr->unsafeGetTensorImpl();
      used.lr_version = device_lr->is_inference() ? 0 : device_lr->_version();
    }
    return used;
  }

  static void check_same(const UsedGroup<Group>& before, const UsedGroup<Group>& now, size_t index) {
    const bool same_lr = same_number(before.group.lr.number, now.group.lr.number) &&
                         before.group.lr.device == now.group.lr.device && before.lr == now.lr &&
                         before.lr_version == now.lr_version;
    const char* const changed = same_lr ? Optimizer::difference(before.group, now.group) : "lr";
    TORCH_CHECK(
        changed == nullptr, Optimizer::kStep, ": ", changed, " of param_groups[", index,
        "] was changed while a step was under way: with step_in_backward, backward has applied a part of the "
        "gradients with what it was before. Change it after step() or before backward(); set it back to make this "
        "step.");
  }

  // A captured step is replayed with the decisions that the host made when it was recorded. Only the devices of
  // the batches that `concerns` picks are queried, because a query makes a CUDA context on a device that has none.
  template <class Concerns, class... Why>
  void refuse_capture(const Concerns& concerns, const Why&... why) {
    for (const auto& batch : walk_.batches()) {
      TORCH_CHECK(
          !concerns(batch) || !is_capturing(batch.kind.device), Optimizer::kStep,
          " while a CUDA graph is being captured: ", why...);
    }
  }

  template <class Update>
  static bool counts_on_host(const Update& update) {
    if constexpr (State::kCounts) {
      return update.count_on_host;
    }
    return false;
  }

  static void launch(const Batch& batch) {
    if (batch.kind.device.is_cpu()) {
      launch_cpu(batch);
    }
#ifdef WITH_CUDA
    if (batch.kind.device.is_cuda()) {
      launch_cuda(batch);
    }
#endif
    if constexpr (State::kCounts) {
      const bool overflow = batch.kind.device.is_cpu() && batch.found_inf != nullptr && *batch.found_inf != 0;
      for (int64_t i = 0; i < batch.count && !overflow; ++i) {
        const auto& update = batch.updates[i];
        if (update.count_on_host) {
          *update.count = update.fresh ? 1 : *update.count + 1;
        }
      }
    }
  }

  // Updates tensors that share memory one after the other, as torch does.
  static void launch_in_order(const Batch& batch) {
    Batch one = batch;
    one.count = 1;
    for (int64_t i = 0; i < batch.count; ++i) {
      one.updates = batch.updates + i;
      one.numel = batch.updates[i].numel;
      launch(one);
    }
  }

  void launch_all(const pybind11::object& grad_scale, const pybind11::object& found_inf, bool in_order) {
    for (const auto& found : walk_.batches()) {
      if (found.updates.empty()) {
        continue;
      }
      Batch batch;
      batch.kind = found.kind;
      batch.updates = found.updates.data();
      batch.count = static_cast<int64_t>(found.updates.size());
      batch.numel = found.numel;
      batch.groups = groups_.data();
      batch.group_count = static_cast<int64_t>(groups_.size());
      at::Tensor scale;
      at::Tensor inf;
      if (!grad_scale.is_none()) {
        scale = scaler_on_device(Optimizer::kStep, grad_scale, batch.kind.device);
        batch.grad_scale = scale.const_data_ptr<float>();
      }
      if (!found_inf.is_none()) {
        inf = scaler_on_device(Optimizer::kStep, found_inf, batch.kind.device);
        batch.found_inf = inf.const_data_ptr<float>();
      }
      std::vector<Group> host_groups;
      if (has_device_lr_) {
        // A learning rate on another device is copied to the host, as torch does it.
        host_groups = groups_;
        for (size_t i = 0; i < host_groups.size(); ++i) {
          const auto& lr = device_lrs_[i];
          if (lr.defined() && lr.device() != batch.kind.device) {
            host_groups[i].lr = {lr.item().toDouble(), nullptr, false};
          }
        }
        batch.groups = host_groups.data();
      }
      in_order ? launch_in_order(batch) : launch(batch);
    }
  }

  void update(const pybind11::object& grad_scale, const pybind11::object& found_inf, bool in_order) {
    int64_t cpu_numel = 0;
    for (const auto& batch : walk_.batches()) {
      cpu_numel += batch.kind.device.is_cpu() ? batch.numel : 0;
    }
    if (cpu_numel >= kReleaseGilNumel && grad_scale.is_none() && found_inf.is_none() && !has_device_lr_) {
      const auto held = walk_.hold_storages();
      walk_.bump_versions();
      walk_.drop_frozen_grads();
      const pybind11::gil_scoped_release release;
      launch_all(grad_scale, found_inf, in_order);
      return;
    }
    launch_all(grad_scale, found_inf, in_order);
    walk_.bump_versions();
    if (!grad_scale.is_none()) {
      walk_.return_copied_grads();
    }
    walk_.drop_frozen_grads();
  }

  // What follows every step, also one that an overflow skipped, because the host does not know about overflows on
  // a GPU. `overlap` is what has_overlap() returned: a parameter that is listed twice counts as two with a state.
  void settle(const pybind11::dict& state, bool overlap) {
    namespace py = pybind11;
    if (!policies_.empty() && (overlap || walk_.has_idle_state())) {
      for (const auto& [index, policy] : policies_) {
        PyObject* const params = params_[index].first.ptr();
        const auto& keys = Optimizer::state_keys();
        policy == FrozenState::kReset ? mark_frozen(state.ptr(), params, keys)
                                      : drop_frozen(state.ptr(), params, keys);
      }
    }
    for (const auto& [group, seed] : seeds_) {
      const auto next = py::int_(seed + 1);
      if (PyDict_SetItem(group.ptr(), Optimizer::group_keys().extra_keys[GroupKeys::kRoundingSeed], next.ptr()) !=
          0) {
        throw py::error_already_set();
      }
    }
  }

  // Kept from step to step only for the capacity of its vectors.
  ParamWalk<State> walk_{Optimizer::kStep, Optimizer::state_keys()};
  std::vector<Group> groups_;
  std::vector<std::pair<pybind11::object, GroupUse>> params_;  // per group
  // Of the groups that do not keep the state of what is frozen, by index into `params_`.
  std::vector<std::pair<size_t, FrozenState>> policies_;
  std::vector<std::pair<pybind11::object, uint64_t>> seeds_;  // of the groups that round stochastically
  std::vector<at::Tensor> device_lrs_;                        // per group; undefined where lr is a number
  bool has_device_lr_ = false;
  bool rounds_stochastically_ = false;
};

// The same behind one interface, for steps in backward.
template <class Optimizer>
class StepsOf : public OptimizerSteps {
 public:
  using Runner = StepRunner<Optimizer>;
  using Used = typename Runner::Used;

  const char* name() const override { return Optimizer::kClass; }
  std::unique_ptr<UsedOptions> nothing_used() const override { return std::make_unique<Used>(); }
  pybind11::object step_part(
      const pybind11::list& param_groups, const pybind11::dict& state, const Selection& selection,
      UsedOptions& used, const std::optional<pybind11::list>& done) const override {
    auto& own = static_cast<Used&>(used);
    Runner::check_number_of_groups(param_groups, own);
    return Runner::run(param_groups, state, pybind11::none(), pybind11::none(), done, &selection, &own);
  }
  void check_unchanged(const pybind11::list& param_groups, const UsedOptions& used) const override {
    Runner::check_unchanged(param_groups, static_cast<const Used&>(used));
  }
};

}  // namespace torch_freeze
