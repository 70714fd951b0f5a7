// One of an optimizer's live param_groups as typed values, read afresh at every step.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/ArrayRef.h>
#include <torch/csrc/utils/pybind.h>

#include <array>
#include <cstddef>
#include <cstdint>

namespace torch_freeze {

// What becomes of the state of frozen parameters.
enum class FrozenState : uint8_t { kKeep, kReset, kDrop };

// The keys of a param group. `names` are those that every group has, in the order in which torch's optimizer
// enters them, "params" first; the others are torch_freeze's own options, which a group may lack.
class GroupKeys {
 public:
  static constexpr size_t kMost = 16;
  enum Extra : size_t { kFrozenState, kBufferDtype, kRoundingSeed, kExtras };

  GroupKeys(
      const char* function, c10::ArrayRef<const char*> names, const std::array<const char*, kExtras>& extra_names);

  const char* function;  // names the caller in error messages
  size_t count = 0;
  std::array<const char*, kMost> names{};
  std::array<PyObject*, kMost> keys{};
  std::array<const char*, kExtras> extra_names{};
  std::array<PyObject*, kExtras> extra_keys{};
};

class GroupReader {
 public:
  // Throws TypeError where `group` is no dict, and KeyError where it lacks one of the keys.
  GroupReader(PyObject* group, int32_t index, const GroupKeys& keys);
  GroupReader(const GroupReader&) = delete;
  GroupReader& operator=(const GroupReader&) = delete;
  ~GroupReader();

  // `key` is an index into GroupKeys::names throughout.
  PyObject* item(size_t key) const { return values_[key]; }
  bool flag(size_t key) const {
    PyObject* const value = item(key);
    return value == Py_True || (value != Py_False && value != Py_None && is_true(value));
  }
  // A tensor of one element, or null where the value is a plain number.
  const at::Tensor* tensor(size_t key) const {
    return PyFloat_CheckExact(item(key)) || PyLong_CheckExact(item(key)) ? nullptr : tensor_behind(key);
  }
  double number(size_t key) const {
    return PyFloat_CheckExact(item(key)) ? PyFloat_AS_DOUBLE(item(key)) : number_behind(key);
  }
  // 1 - value, rounded as Python rounds it: a NumPy or tensor scalar has a precision of its own.
  double one_minus(size_t key) const {
    return PyFloat_CheckExact(item(key)) ? 1.0 - PyFloat_AS_DOUBLE(item(key)) : one_minus_behind(key);
  }
  // The type in which the value computes with a number of Python's, or Undefined if it is one. Tensors of narrow
  // types and on a GPU count as numbers of Python's.
  c10::ScalarType computes_in(size_t key) const {
    return PyFloat_CheckExact(item(key)) || PyLong_CheckExact(item(key)) ? c10::ScalarType::Undefined
                                                                         : computes_in_behind(key);
  }
  bool wants_gradient(size_t key) const;
  // Two numbers, as a tuple or a list.
  std::array<double, 2> pair(size_t key) const {
    PyObject* const value = item(key);
    return is_pair_of_floats(value)
               ? std::
                     array{PyFloat_AS_DOUBLE(PyTuple_GET_ITEM(value, 0)), PyFloat_AS_DOUBLE(PyTuple_GET_ITEM(value, 1))}
               : pair_behind(key);
  }
  // Whether they are numbers of Python's: a NumPy or tensor scalar has a precision of its own.
  bool is_plain_pair(size_t key) const { return is_pair_of_floats(item(key)) || is_plain_pair_behind(key); }

  FrozenState frozen_state() const {
    return extras_[GroupKeys::kFrozenState] == nullptr ? FrozenState::kKeep : frozen_state_behind();
  }
  // Of the optimizer's buffers; Undefined: the parameter's own.
  c10::ScalarType buffer_type() const {
    PyObject* const value = extras_[GroupKeys::kBufferDtype];
    return value == nullptr || value == Py_None ? c10::ScalarType::Undefined : buffer_type_behind();
  }
  uint64_t rounding_seed() const;

 private:
  static bool is_pair_of_floats(PyObject* value) {
    return PyTuple_CheckExact(value) && PyTuple_GET_SIZE(value) == 2 &&
           PyFloat_CheckExact(PyTuple_GET_ITEM(value, 0)) && PyFloat_CheckExact(PyTuple_GET_ITEM(value, 1));
  }
  bool is_true(PyObject* value) const;
  const at::Tensor* tensor_behind(size_t key) const;
  double number_behind(size_t key) const;
  double one_minus_behind(size_t key) const;
  c10::ScalarType computes_in_behind(size_t key) const;
  std::array<double, 2> pair_behind(size_t key) const;
  bool is_plain_pair_behind(size_t key) const;
  FrozenState frozen_state_behind() const;
  c10::ScalarType buffer_type_behind() const;
  void note_extra(PyObject* key, PyObject* value);
  void keep() const;

  const GroupKeys& keys_;
  std::array<PyObject*, GroupKeys::kMost> values_;
  std::array<PyObject*, GroupKeys::kExtras> extras_{};  // null where the group has none
  int32_t index_;
  mutable bool kept_ = false;
};

// Whether a tensor's bytes are its value. A wrapper or a zero tensor may have no bytes, and a negation may be
// pending.
bool holds_its_value(const at::Tensor& tensor);

// A GradScaler's scalar as one float on `device`, whatever it came as.
at::Tensor scaler_on_device(const char* function, const pybind11::object& scalar, c10::Device device);

}  // namespace torch_freeze
