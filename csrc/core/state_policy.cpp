#include "core/state_policy.h"

#include <dlfcn.h>

#include <vector>

namespace torch_freeze {
namespace {

namespace py = pybind11;

// The hash of a tensor is its id, so the dict does not have to call Python for it. CPython exports the look-up
// with a known hash, but does not promise it; if it is missing, the ordinary look-up is used.
using KnownHashLookup = PyObject* (*)(PyObject*, PyObject*, Py_hash_t);
const auto lookup_known_hash = reinterpret_cast<KnownHashLookup>(dlsym(RTLD_DEFAULT, "_PyDict_GetItem_KnownHash"));

// Calls `visit(parameter, its entry in the state)` for the frozen ones that have any.
template <class Visit>
void for_each_frozen(PyObject* state, PyObject* params, Visit&& visit) {
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(params); ++i) {
    PyObject* const param = PySequence_Fast_GET_ITEM(params, i);
    if (!THPVariable_Check(param)) {
      continue;
    }
    const auto* const meta = autograd_meta_of(THPVariable_Unpack(param).unsafeGetTensorImpl());
    if (meta == nullptr || (!meta->requires_grad_ && meta->grad_fn_ == nullptr)) {
      PyObject* const entry = find_state(state, param, is_exact(param));
      if (entry != nullptr && PyDict_Check(entry)) {
        visit(param, entry);
      }
    }
  }
}

}  // namespace

PyObject* intern(const char* text) {
  PyObject* key = PyUnicode_InternFromString(text);
  if (key == nullptr) {
    throw py::error_already_set();
  }
  return key;
}

PyObject* find_state(PyObject* state, PyObject* param, bool exact) {
  PyObject* const found =
      exact && lookup_known_hash != nullptr
          ? lookup_known_hash(state, param, static_cast<Py_hash_t>(reinterpret_cast<intptr_t>(param)))
          : PyDict_GetItemWithError(state, param);
  if (found == nullptr && PyErr_Occurred() != nullptr) {
    throw py::error_already_set();
  }
  return found;
}

bool is_stale(PyObject* entry, const StateKeys& keys) {
  PyObject* const mark = PyDict_GetItemWithError(entry, keys.stale);
  if (mark == nullptr && PyErr_Occurred() != nullptr) {
    throw py::error_already_set();
  }
  return mark == Py_True;
}

void mark_frozen(PyObject* state, PyObject* params, const StateKeys& keys) {
  for_each_frozen(state, params, [&](PyObject*, PyObject* entry) {
    bool any = false;
    for (size_t k = 0; k < keys.count; ++k) {
      PyObject* const buffer = PyDict_GetItemWithError(entry, keys.slot[k]);
      any |= buffer != nullptr && buffer != Py_None;
    }
    if (any && !is_stale(entry, keys) && PyDict_SetItem(entry, keys.stale, Py_True) != 0) {
      throw py::error_already_set();
    }
  });
}

void drop_frozen(PyObject* state, PyObject* params, const StateKeys& keys) {
  // Freeing a buffer can run user code, so all are removed from the state first.
  std::vector<py::object> dropped;
  std::vector<py::object> emptied;
  const auto drop = [&](PyObject* entry, PyObject* key) {
    if (PyObject* const value = PyDict_GetItemWithError(entry, key); value != nullptr) {
      dropped.push_back(py::reinterpret_borrow<py::object>(value));
      if (PyDict_DelItem(entry, key) != 0) {
        throw py::error_already_set();
      }
    }
  };
  for_each_frozen(state, params, [&](PyObject* param, PyObject* entry) {
    for (size_t k = 0; k < keys.count; ++k) {
      drop(entry, keys.slot[k]);
    }
    drop(entry, keys.stale);
    if (PyDict_GET_SIZE(entry) == 0) {
      emptied.push_back(py::reinterpret_borrow<py::object>(param));
    }
  });
  for (const auto& param : emptied) {
    if (PyDict_DelItem(state, param.ptr()) != 0) {
      if (PyErr_ExceptionMatches(PyExc_KeyError) == 0) {
        throw py::error_already_set();
      }
      PyErr_Clear();  // a parameter that is listed twice: gone already
    }
  }
}

}  // namespace torch_freeze
