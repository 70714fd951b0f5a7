#include "core/group_reader.h"

#include <ATen/ops/scalar_tensor.h>
#include <c10/core/DefaultDtype.h>
#include <c10/util/Exception.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <cstdlib>
#include <string>
#include <string_view>

#include "core/state_policy.h"

namespace torch_freeze {
namespace {

namespace py = pybind11;

// An int so small that all sums and conversions of it are exact.
bool is_small_int(PyObject* value) {
  int overflow = 0;
  return PyLong_CheckExact(value) && std::abs(PyLong_AsLongAndOverflow(value, &overflow)) < (1L << 30) &&
         overflow == 0;
}

}  // namespace

GroupKeys::GroupKeys(
    const char* function, c10::ArrayRef<const char*> names, const std::array<const char*, kExtras>& extra_names)
    : function(function), count(names.size()), extra_names(extra_names) {
  std::copy(names.begin(), names.end(), this->names.begin());
  std::transform(names.begin(), names.end(), keys.begin(), intern);
  std::transform(extra_names.begin(), extra_names.end(), extra_keys.begin(), intern);
}

GroupReader::GroupReader(PyObject* group, int32_t index, const GroupKeys& keys) : keys_(keys), index_(index) {
  if (!PyDict_Check(group)) {
    throw py::type_error(
        c10::str(
            keys.function, ": param_groups[", index, "] is a ", Py_TYPE(group)->tp_name, "; it has to be a dict"));
  }
  // As a rule the dict has the keys in this order, with others between them: one pass without look-ups.
  PyObject* key = nullptr;
  PyObject* value = nullptr;
  Py_ssize_t position = 0;
  size_t next = 0;
  while (PyDict_Next(group, &position, &key, &value) != 0) {
    if (next < keys.count && key == keys.keys[next]) {
      values_[next++] = value;
    } else {
      note_extra(key, value);
    }
  }
  for (; next < keys.count; ++next) {
    values_[next] = PyDict_GetItemWithError(group, keys.keys[next]);
    if (values_[next] == nullptr) {
      if (PyErr_Occurred() == nullptr) {
        PyErr_Format(PyExc_KeyError, "%s: param_groups[%d] has no '%s'", keys.function, index, keys.names[next]);
      }
      throw py::error_already_set();
    }
  }
}

GroupReader::~GroupReader() {
  if (kept_) {
    std::for_each_n(values_.begin(), keys_.count, [](PyObject* value) { Py_DECREF(value); });
    std::for_each(extras_.begin(), extras_.end(), [](PyObject* value) { Py_XDECREF(value); });
  }
}

bool GroupReader::is_true(PyObject* value) const {
  keep();
  const int truth = PyObject_IsTrue(value);
  if (truth < 0) {
    throw py::error_already_set();
  }
  return truth != 0;
}

const at::Tensor* GroupReader::tensor_behind(size_t key) const {
  PyObject* value = item(key);
  if (!THPVariable_Check(value)) {
    return nullptr;
  }
  keep();
  const auto& tensor = THPVariable_Unpack(value);
  TORCH_CHECK_VALUE(
      tensor.numel() == 1, keys_.function, ": ", keys_.names[key], " of param_groups[", index_,
      "] is a tensor of ", tensor.numel(), " elements; Tensor lr must be 1-element");
  return &tensor;
}

double GroupReader::number_behind(size_t key) const {
  PyObject* value = item(key);
  if (is_small_int(value)) {
    return static_cast<double>(PyLong_AsLong(value));
  }
  if (const auto* found = tensor(key)) {
    TORCH_CHECK_TYPE(
        !found->is_complex(), keys_.function, ": ", keys_.names[key], " of param_groups[", index_, "] is a ",
        found->scalar_type(), " tensor; it has to be a real number");
    return found->item<double>();
  }
  keep();
  const double number = PyFloat_AsDouble(value);
  if (number == -1.0 && PyErr_Occurred() != nullptr) {
    if (PyErr_ExceptionMatches(PyExc_TypeError) == 0 && PyErr_ExceptionMatches(PyExc_OverflowError) == 0) {
      throw py::error_already_set();
    }
    PyErr_Clear();
    throw py::type_error(
        c10::str(
            keys_.function, ": ", keys_.names[key], " of param_groups[", index_, "] is a ",
            Py_TYPE(value)->tp_name, "; it has to be a number"));
  }
  return number;
}

double GroupReader::one_minus_behind(size_t key) const {
  PyObject* value = item(key);
  if (is_small_int(value)) {
    return 1.0 - static_cast<double>(PyLong_AsLong(value));
  }
  number(key);  // says what is wrong with it, if anything is
  return py::cast<double>(py::float_(py::int_(1) - py::reinterpret_borrow<py::object>(value)));
}

c10::ScalarType GroupReader::computes_in_behind(size_t key) const {
  if (const auto* found = tensor(key)) {
    const auto type = c10::isIntegralType(found->scalar_type(), true) ? c10::get_default_dtype_as_scalartype()
                                                                      : found->scalar_type();
    return !found->is_cuda() && (type == c10::kFloat || type == c10::kDouble) ? type : c10::ScalarType::Undefined;
  }
  keep();
  const auto product = py::reinterpret_steal<py::object>(PyNumber_Multiply(item(key), py::float_(1.0).ptr()));
  if (!product) {
    if (PyErr_ExceptionMatches(PyExc_TypeError) == 0) {
      throw py::error_already_set();
    }
    PyErr_Clear();  // a number without products with Python's, such as a Decimal
    return c10::ScalarType::Undefined;
  }
  const std::string_view name = Py_TYPE(product.ptr())->tp_name;
  return name == "numpy.float32" ? c10::kFloat : name == "numpy.float16" ? c10::kHalf : c10::kDouble;
}

std::array<double, 2> GroupReader::pair_behind(size_t key) const {
  PyObject* const value = item(key);
  std::array<double, 2> numbers{};
  if (!(PyTuple_Check(value) || PyList_Check(value)) || PySequence_Fast_GET_SIZE(value) != 2) {
    throw py::type_error(
        c10::str(
            keys_.function, ": ", keys_.names[key], " of param_groups[", index_, "] is ",
            py::cast<std::string>(py::repr(value)), "; it has to be two numbers"));
  }
  for (Py_ssize_t i = 0; i < 2; ++i) {
    PyObject* const each = PySequence_Fast_GET_ITEM(value, i);
    if (PyFloat_CheckExact(each)) {
      numbers[i] = PyFloat_AS_DOUBLE(each);
    } else {
      keep();
      numbers[i] = py::cast<double>(py::float_(py::reinterpret_borrow<py::object>(each)));
    }
  }
  return numbers;
}

bool GroupReader::is_plain_pair_behind(size_t key) const {
  PyObject* const value = item(key);
  if (!(PyTuple_Check(value) || PyList_Check(value)) || PySequence_Fast_GET_SIZE(value) != 2) {
    return false;
  }
  PyObject** const items = PySequence_Fast_ITEMS(value);
  return std::all_of(
      items, items + 2, [](PyObject* each) { return PyFloat_CheckExact(each) || is_small_int(each); });
}

bool GroupReader::wants_gradient(size_t key) const {
  const auto* found = tensor(key);
  return found != nullptr && found->requires_grad();
}

FrozenState GroupReader::frozen_state_behind() const {
  PyObject* const value = extras_[GroupKeys::kFrozenState];
  const std::string name = PyUnicode_Check(value) ? py::cast<std::string>(value) : "";
  TORCH_CHECK_VALUE(
      name == "keep" || name == "reset" || name == "drop", keys_.function, ": ",
      keys_.extra_names[GroupKeys::kFrozenState], " of param_groups[", index_, "] is ",
      py::cast<std::string>(py::repr(value)), "; it has to be 'keep', 'reset' or 'drop'");
  return name == "keep" ? FrozenState::kKeep : name == "reset" ? FrozenState::kReset : FrozenState::kDrop;
}

c10::ScalarType GroupReader::buffer_type_behind() const {
  PyObject* const value = extras_[GroupKeys::kBufferDtype];
  TORCH_CHECK_VALUE(
      THPDtype_Check(value) && reinterpret_cast<THPDtype*>(value)->scalar_type == c10::kBFloat16, keys_.function,
      ": ", keys_.extra_names[GroupKeys::kBufferDtype], " of param_groups[", index_, "] is ",
      py::cast<std::string>(py::repr(value)), "; it has to be torch.bfloat16 or None");
  return c10::kBFloat16;
}

uint64_t GroupReader::rounding_seed() const {
  PyObject* const value = extras_[GroupKeys::kRoundingSeed];
  if (value == nullptr) {
    return 0;
  }
  TORCH_CHECK_VALUE(
      PyLong_Check(value), keys_.function, ": ", keys_.extra_names[GroupKeys::kRoundingSeed], " of param_groups[",
      index_, "] is a ", Py_TYPE(value)->tp_name, "; it has to be an int");
  return PyLong_AsUnsignedLongLongMask(value);
}

void GroupReader::note_extra(PyObject* key, PyObject* value) {
  // Two interned strings are equal if their pointers are.
  for (size_t i = 0; i < extras_.size(); ++i) {
    PyObject* const wanted = keys_.extra_keys[i];
    if (key == wanted ||
        (PyUnicode_CheckExact(key) && !PyUnicode_CHECK_INTERNED(key) && PyUnicode_Compare(key, wanted) == 0)) {
      extras_[i] = value;
    }
  }
}

// Reading anything but a plain number can run user code, which can remove the values from the group.
void GroupReader::keep() const {
  if (!kept_) {
    kept_ = true;
    std::for_each_n(values_.begin(), keys_.count, [](PyObject* value) { Py_INCREF(value); });
    std::for_each(extras_.begin(), extras_.end(), [](PyObject* value) { Py_XINCREF(value); });
  }
}

bool holds_its_value(const at::Tensor& tensor) {
  return !tensor.is_neg() && !tensor.is_conj() && !tensor.key_set().has(c10::DispatchKey::Python) &&
         tensor.has_storage() && tensor.storage().data() != nullptr;
}

at::Tensor scaler_on_device(const char* function, const py::object& scalar, c10::Device device) {
  at::Tensor tensor = THPVariable_Check(scalar.ptr()) ? THPVariable_Unpack(scalar.ptr()).detach()
                                                      : at::scalar_tensor(py::cast<double>(scalar), at::kFloat);
  TORCH_CHECK_VALUE(
      tensor.numel() == 1, function, ": grad_scale and found_inf hold one number; got ", tensor.numel());
  if (!holds_its_value(tensor)) {
    tensor = at::scalar_tensor(tensor.item().toDouble(), at::kFloat);
  }
  return tensor.to(device, at::kFloat);
}

}  // namespace torch_freeze
