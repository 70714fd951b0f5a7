// The walk over an optimizer's live Python objects: the only C++ that knows dicts, lists and `.grad`.
//
// Nothing is kept from one step to the next. What a step finds is collected first, checked as a whole, and only
// then written: an error anywhere leaves parameters, gradients and state as they were.
#pragma once

#include <c10/core/TensorImpl.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <set>
#include <utility>
#include <vector>

#include "core/tensor_update.h"

namespace torch_freeze {

// How the parameters of one group are to be taken.
struct GroupUse {
  int32_t index = 0;        // of the group in param_groups
  bool has_buffer = false;  // the state keeps a buffer per parameter
  bool stock_form = false;  // every trainable parameter goes to the rest
  // Of the buffers; Undefined: each parameter's own. bfloat16 is rounded stochastically where it is asked for.
  c10::ScalarType momentum_type = c10::ScalarType::Undefined;
  // Where the parameters given are not all of the group's: their positions in its list.
  const Py_ssize_t* positions = nullptr;
};

// What lies behind the pointers of one TensorUpdate.
struct UpdateTensors {
  PyObject* object;  // the parameter, owned by the group's list
  c10::TensorImpl* param;
  c10::TensorImpl* grad;
  c10::TensorImpl* buffer;  // null: none in the state yet, or none wanted
};

// What one launch covers.
struct WalkBatch {
  UpdateBatch launch;  // `updates`, `count` and `groups` are filled in at the launch
  std::vector<TensorUpdate> updates;
  std::vector<UpdateTensors> tensors;
};

class ParamWalk {
 public:
  // The state maps a parameter to a dict that holds its buffer under `buffer_key`; `function` names the caller in
  // error messages.
  ParamWalk(const char* function, PyObject* buffer_key) : function_(function), buffer_key_(buffer_key) {}

  // Collects the parameters of one group. Throws on what no kernel and no fallback can take.
  void add_group(PyObject* params, const GroupUse& use);
  // Leaves out what an earlier walk returned as its rest.
  void skip(const pybind11::list& rest);

  // What the kernels do not cover and what shares memory with it, as [(group index, [parameter, …]), …]: tensors
  // that share memory are updated in the order of the list, so either all of them by the kernels or none.
  pybind11::object rest();
  bool has_rest() const { return !rest_.empty(); }
  // Buffers that do not hold the past of their parameter: none yet, or stale.
  bool has_fresh() const { return !fresh_.empty(); }
  bool has_fresh(const WalkBatch& batch) const {
    return std::any_of(
        fresh_.begin(), fresh_.end(), [&](const Fresh& fresh) { return &batches_[fresh.batch] == &batch; });
  }
  std::vector<WalkBatch>& batches() { return batches_; }
  // Whether two of the tensors to be written share memory, so that their order matters.
  bool has_overlap() const;

  // Makes the buffers that are missing or of another type than asked for, and enters them into the state; all of
  // them or none. `overlap` is what has_overlap() says.
  void make_fresh_buffers(bool overlap);
  // After the update: what started from zero is no longer marked as stale.
  void unmark_fresh();
  // Marks the buffers of the frozen parameters among `params` as stale, so that they start from zero when it is
  // their turn again; or takes them out of the state.
  void mark_frozen(PyObject* params);
  void drop_frozen(PyObject* params);
  // Whether the state may hold anything for parameters that this walk did not step.
  bool has_idle_state() const;
  // Where gradients were copied into another layout and then changed, brings them back.
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
  struct Slot;
  struct Fresh {
    PyObject* param;  // owned by the group's list
    PyObject* state;  // its entry in the state, or null
    size_t batch;
    size_t update;
    at::Tensor buffer;
    bool enter = true;               // into the state
    bool marked = false;             // as stale, in the state
    pybind11::object replaced = {};  // what its entry named before: None, or a buffer of another type
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
  PyObject* state_of(PyObject* param, bool exact);
  void emit(const Slot& slot, const GroupUse& use);
  void emit_unusual(const Slot& slot, const GroupUse& use);
  void emit_with_own_buffer(const Slot& slot, const GroupUse& use);
  bool emit_local(const Slot& slot, const GroupUse& use);
  void check_fit(
      const char* what, const c10::TensorImpl* tensor, const char* fix, const Slot& slot,
      const GroupUse& use) const;
  void push(
      const Slot& slot, c10::TensorImpl* grad, const GroupUse& use, c10::ScalarType param_type,
      c10::ScalarType grad_type);
  template <class Visit>
  void for_each_frozen(PyObject* params, Visit&& visit);
  [[noreturn]] void raise_no_memory(const Slot& slot, const c10::TensorImpl* grad, const GroupUse& use) const;
  WalkBatch& batch_for(
      c10::Device device, c10::ScalarType param_type, c10::ScalarType grad_type, const GroupUse& use);

  const char* function_;
  PyObject* state_ = nullptr;
  PyObject* buffer_key_;
  std::vector<WalkBatch> batches_;
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
  bool shared_buffers_ = false;  // somebody else holds a buffer too
  // Pointers alone are kept while nothing but this code runs. A user's code may let go of anything, so before it
  // can run, all that was found is held, and what follows as it is found.
  bool holding_ = false;
  std::vector<at::Tensor> held_tensors_;
  std::vector<c10::Storage> held_storages_;
  std::vector<pybind11::object> held_objects_;
};

}  // namespace torch_freeze
