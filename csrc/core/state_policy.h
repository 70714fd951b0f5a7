// What an optimizer's state holds for a parameter, and what happens to it while the parameter is frozen.
#pragma once

#include <c10/core/TensorImpl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <cstddef>
#include <memory>

namespace torch_freeze {

constexpr size_t kMostSlots = 4;

// Interned, since a look-up then compares pointers.
PyObject* intern(const char* text);

// The keys of one parameter's state: the buffers, then the count.
class StateKeys {
 public:
  // `stale` is the key that marks old buffers, which start from zero at the next step. `dtype_option` is the param
  // group's option for the buffers' dtype, for error messages.
  template <size_t kSlots>
  StateKeys(const std::array<const char*, kSlots>& slots, const char* stale, const char* dtype_option)
      : count(kSlots), stale(intern(stale)), dtype_option(dtype_option) {
    static_assert(kSlots <= kMostSlots);
    for (size_t k = 0; k < kSlots; ++k) {
      names[k] = slots[k];
      slot[k] = intern(slots[k]);
    }
  }

  size_t count;  // of the keys
  std::array<const char*, kMostSlots> names{};
  std::array<PyObject*, kMostSlots> slot{};
  PyObject* stale;
  const char* dtype_option;
};

// The member behind TensorImpl::autograd_meta(), whose call across libraries would be a third of what a frozen
// parameter costs. Explicit instantiation may name what is not public; a torch without the member does not
// compile.
using AutogradMetaMember = std::unique_ptr<c10::AutogradMetaInterface> c10::TensorImpl::*;
AutogradMetaMember autograd_meta_member();
template <AutogradMetaMember kMember>
struct AutogradMetaAccess {
  friend AutogradMetaMember autograd_meta_member() { return kMember; }
};
template struct AutogradMetaAccess<&c10::TensorImpl::autograd_meta_>;

inline torch::autograd::AutogradMeta* autograd_meta_of(const c10::TensorImpl* tensor) {
  return static_cast<torch::autograd::AutogradMeta*>((tensor->*autograd_meta_member()).get());
}

// Whether it is a Tensor or a Parameter and no subclass: hashing it then runs no user code.
inline bool is_exact(PyObject* tensor) {
  const PyTypeObject* const type = Py_TYPE(tensor);
  return type == reinterpret_cast<PyTypeObject*>(ParameterClass) ||
         type == reinterpret_cast<PyTypeObject*>(THPVariableClass);
}

// The entry of a parameter in the optimizer's state: borrowed; null where it is missing.
PyObject* find_state(PyObject* state, PyObject* param, bool exact);

// Whether the buffers in a parameter's state are marked as stale.
bool is_stale(PyObject* entry, const StateKeys& keys);

// Marks the buffers of the frozen parameters among `params` as stale, so that they start from zero after
// unfreezing.
void mark_frozen(PyObject* state, PyObject* params, const StateKeys& keys);
// Removes those buffers from the state.
void drop_frozen(PyObject* state, PyObject* params, const StateKeys& keys);

}  // namespace torch_freeze
