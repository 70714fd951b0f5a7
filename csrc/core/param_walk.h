// The walk over an optimizer's live Python objects: the only C++ that knows dicts, lists and `.grad`.
//
// Nothing is kept from one step to the next. What a step finds is collected first, checked as a whole, and only
// then written: an error anywhere leaves parameters, gradients and state as they were.
#pragma once

#include <c10/core/TensorImpl.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <array>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "core/state_policy.h"
#include "core/tensor_update.h"

namespace torch_freeze {

// How the walk treats the parameters of one group.
struct GroupUse {
  int32_t index = 0;             // of the group in param_groups
  int buffers = 0;               // how many of the optimizer's buffers the state holds for each parameter
  bool stock_form = false;       // every trainable parameter goes to the rest
  bool count_on_device = false;  // where a new count is put: on the parameter's device, or the host
  bool count_in_double = false;  // how torch would make it
  // The dtype of the buffers; Undefined: each parameter's own. An explicit bfloat16 is rounded stochastically.
  c10::ScalarType buffer_type = c10::ScalarType::Undefined;
  // The positions of the parameters in the group's list, if they are only some of its parameters.
  const Py_ssize_t* positions = nullptr;
};

// The tensors behind the pointers of one TensorUpdate.
template <class Layout>
struct UpdateTensors {
  PyObject* object;  // the parameter, owned by the group's list
  c10::TensorImpl* param;
  c10::TensorImpl* grad;
  // The buffers, then the count; null: not in the state yet, or not needed.
  std::array<c10::TensorImpl*, Layout::kSlots> slot;
};

// What one launch covers.
template <class Layout>
struct WalkBatch {
  BatchKind kind;
  std::vector<TensorUpdate<Layout>> updates;
  std::vector<UpdateTensors<Layout>> tensors;
  int64_t numel = 0;
};

template <class Layout>
class ParamWalk {
 public:
  using Batch = WalkBatch<Layout>;
  static constexpr int kBuffers = Layout::kBuffers;
  static constexpr bool kCounts = Layout::kCounts;
  static constexpr int kSlots = Layout::kSlots;

  // `function` names the caller in error messages.
  ParamWalk(const char* function, const StateKeys& keys) : function_(function), keys_(keys) {}

  // Collects the parameters of one group. Throws if neither a kernel nor torch's form can take one.
  void add_group(PyObject* params, const GroupUse& use);
  // Skips what an earlier walk returned by rest().
  void skip(const pybind11::list& rest);

  // What the kernels do not cover and what shares memory with it, as [(group index, [parameter, …]), …]: tensors
  // that share memory are updated in the order of the list, so either all of them by the kernels or none.
  pybind11::object rest();
  bool has_rest() const { return !rest_.empty(); }
  // Whether a buffer has to start from zero, because it is missing or stale.
  bool has_fresh() const { return !fresh_.empty(); }
  bool has_fresh(const Batch& batch) const {
    return std::any_of(
        fresh_.begin(), fresh_.end(), [&](const Fresh& fresh) { return &batches_[fresh.batch] == &batch; });
  }
  std::vector<Batch>& batches() { return batches_; }
  // Whether the host counts the updates of a tensor on a GPU.
  bool counts_gpu_on_host() const { return counts_gpu_on_host_; }
  // Whether two of the tensors to be written share memory, so that their order matters.
  bool has_overlap() const;

  // Makes the buffers that are missing or of another type than asked for, and enters them into the state; all of
  // them or none. `overlap` is what has_overlap() says.
  void make_fresh_buffers(bool overlap);
  // After the update: removes the marks of stale buffers.
  void unmark_fresh();
  // Whether the state may hold anything for parameters that this walk did not step.
  bool has_idle_state() const;
  // Copies changed gradients back, if they had been copied into another layout.
  void return_copied_grads();
  // Keeps the memory behind every update alive for as long as the result lives.
  std::vector<c10::Storage> hold_storages() const;
  // Tells autograd what was written.
  void bump_versions();
  // Sets `.grad` of every frozen parameter to None.
  void drop_frozen_grads();
  // Forgets everything but the capacity of its vectors, so that a steady step allocates nothing.
  void reset(PyObject* state);

 private:
  // One parameter that has a gradient.
  struct Slot {
    PyObject* object;
    Py_ssize_t index;  // in the group's list
    bool exact;        // Tensor or Parameter, no subclass
    c10::TensorImpl* param;
    torch::autograd::AutogradMeta* meta;
    c10::TensorImpl* grad;
    PyObject* state;  // null: none
    // The buffers, then the count.
    std::array<PyObject*, kSlots> held_object;  // null: none, or None
    std::array<c10::TensorImpl*, kSlots> held;
  };
  static bool is_used(int k, const GroupUse& use) { return k < use.buffers || (kCounts && k == kBuffers); }
  struct Fresh {
    PyObject* param;  // owned by the group's list
    PyObject* state;  // its entry in the state, or null
    size_t batch;
    size_t update;
    int buffers;
    bool count_on_device = false;
    std::array<at::Tensor, kSlots> held = {};
    bool enter = true;    // into the state
    bool marked = false;  // as stale, in the state
    // What its entry named before: None, or buffers of another type.
    std::array<pybind11::object, kSlots> replaced = {};
  };
  struct Rest {
    int32_t group;
    Py_ssize_t index;  // in the group's list
    pybind11::object param;
  };
  struct CopiedGrad {
    torch::autograd::AutogradMeta* meta;  // of the parameter
    at::Tensor copy;
  };

  void leave(const Slot& slot, const GroupUse& use);
  void leave_what_overlaps();
  void hold(c10::TensorImpl* tensor);
  void hold_from_here_on();
  static bool is_usual(const Slot& slot, const GroupUse& use);
  static bool has_usable_count(const Slot& slot, const GroupUse& use);
  static bool may_be_shared(const Slot& slot, int k);
  static bool overlaps_own(const Slot& slot, const c10::TensorImpl* grad, int k);
  PyObject* state_of(PyObject* param, bool exact);
  void emit(const Slot& slot, const GroupUse& use);
  void emit_unusual(const Slot& slot, const GroupUse& use);
  void emit_with_own_buffer(const Slot& slot, const GroupUse& use);
  bool emit_local(const Slot& slot, const GroupUse& use);
  void check_fit(
      const char* what, const c10::TensorImpl* tensor, const char* fix, const Slot& slot,
      const GroupUse& use) const;
  void check_written(c10::TensorImpl* tensor, const std::string& of, const Slot& slot, const GroupUse& use) const;
  void check_buffer(int k, const Slot& slot, const GroupUse& use) const;
  void push(
      const Slot& slot, c10::TensorImpl* grad, const GroupUse& use, c10::ScalarType param_type,
      c10::ScalarType grad_type);
  void push_unusual(
      const Slot& slot, c10::TensorImpl* grad, const GroupUse& use, c10::ScalarType param_type,
      c10::ScalarType grad_type);
  [[noreturn]] void raise_no_memory(const Slot& slot, const c10::TensorImpl* grad, const GroupUse& use) const;
  Batch& batch_for(c10::Device device, c10::ScalarType param_type, c10::ScalarType grad_type, const GroupUse& use);

  const char* function_;
  PyObject* state_ = nullptr;
  const StateKeys& keys_;
  std::vector<Batch> batches_;
  std::vector<c10::TensorImpl*> frozen_;
  std::vector<Fresh> fresh_;
  std::vector<CopiedGrad> copied_;
  std::vector<at::Tensor> locals_;          // what DTensors hold on this process
  std::vector<c10::TensorImpl*> wrappers_;  // the DTensors themselves
  std::vector<Rest> rest_;
  std::set<std::pair<int32_t, PyObject*>> skipped_;  // (group, parameter)
  Py_ssize_t state_position_ = 0;                    // of the entry guessed to come next
  int state_misses_ = 0;
  Py_ssize_t states_found_ = 0;
  bool counts_gpu_on_host_ = false;
  bool shared_buffers_ = false;  // a buffer has other references too
  // Plain pointers are enough while only this code runs. User code may free anything, so before it can run, the
  // walk takes references to all that it has found, and from then on to all that it finds.
  bool holding_ = false;
  std::vector<at::Tensor> held_tensors_;
  std::vector<c10::Storage> held_storages_;
  std::vector<pybind11::object> held_objects_;
};

// What this process holds of a torch.distributed.tensor.DTensor.
at::Tensor local_of(pybind11::handle dtensor);

// The place of a parameter, for error messages.
inline std::string place(const GroupUse& use, Py_ssize_t index) {
  return c10::str("param_groups[", use.index, "]['params'][", index, "]");
}

inline bool has_own_buffer_type(const GroupUse& use) { return use.buffer_type != c10::ScalarType::Undefined; }

}  // namespace torch_freeze
