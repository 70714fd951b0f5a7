// What the kernels do not take: it is copied into a layout that they take, left to torch's own form, or refused.
#include <ATen/MemoryOverlap.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <array>
#include <tuple>

#include "core/dtypes.h"
#include "core/overlap.h"
#include "core/param_walk.h"
#include "core/tensor_facts.h"

namespace torch_freeze {
namespace {

namespace py = pybind11;
using c10::TensorImpl;

// Whether a gradient repeats elements. On the CPU torch then rounds some of the products with a scalar before it
// adds them, and others not.
inline bool is_rounded_otherwise(const TensorImpl* grad) {
  const auto type = type_of(grad);
  return (type == c10::kFloat || type == c10::kDouble) && device_of_plain(grad).is_cpu() &&
         at::has_internal_overlap(const_cast<TensorImpl*>(grad)) == at::MemOverlap::Yes;
}

// A subclass that does not override operators is treated like a plain tensor.
bool overrides_operators(PyObject* tensor) {
  static const auto* plain = new py::object(py::module_::import("torch._C").attr("_disabled_torch_function_impl"));
  const auto type = py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(Py_TYPE(tensor)));
  return type.attr("__torch_function__").ptr() != plain->ptr();
}

// torch.distributed.tensor.DTensor; null if it has not been imported, because then no tensor is one.
PyTypeObject* dtensor_type() {
  static PyObject* type = nullptr;
  if (type == nullptr) {
    PyObject* const module = PyDict_GetItemString(PyImport_GetModuleDict(), "torch.distributed.tensor");
    if (module != nullptr && PyObject_HasAttrString(module, "DTensor") != 0) {
      type = py::object(py::handle(module).attr("DTensor")).release().ptr();
    }
  }
  return reinterpret_cast<PyTypeObject*>(type);
}

// Whether the same element of both lies in the same place.
bool same_placement(py::handle a, py::handle b) {
  return a.is(b) || (a.attr("placements").equal(b.attr("placements")) && a.attr("mesh").equal(b.attr("mesh")));
}

// Whether the local tensors are terms of a sum that has not been computed yet.
bool is_partial(py::handle spec) {
  for (const auto placement : spec.attr("placements")) {
    if (py::cast<bool>(placement.attr("is_partial")())) {
      return true;
    }
  }
  return false;
}

}  // namespace

at::Tensor local_of(py::handle dtensor) {
  static PyObject* const name = PyUnicode_InternFromString("_local_tensor");
  return THPVariable_Unpack(dtensor.attr(name).ptr());
}

template <class Layout>
void ParamWalk<Layout>::leave(const Slot& slot, const GroupUse& use) {
  rest_.push_back({use.index, slot.index, py::reinterpret_borrow<py::object>(slot.object)});
}

template <class Layout>
void ParamWalk<Layout>::leave_what_overlaps() {
  std::vector<Memory> left;
  for (const auto& [group, index, param] : rest_) {
    left.push_back(memory_of(THPVariable_Unpack(param.ptr()).unsafeGetTensorImpl()));
    PyObject* const entry = state_of(param.ptr(), THPVariable_CheckExact(param.ptr()));
    for (int k = 0; entry != nullptr && PyDict_Check(entry) && k < kSlots; ++k) {
      PyObject* const buffer = PyDict_GetItemWithError(entry, keys_.slot[k]);
      if (buffer != nullptr && THPVariable_Check(buffer)) {
        left.push_back(memory_of(THPVariable_Unpack(buffer).unsafeGetTensorImpl()));
      }
    }
  }
  std::vector<std::pair<const Batch*, size_t>> others;
  for (const auto& batch : batches_) {
    for (size_t i = 0; i < batch.updates.size(); ++i) {
      others.emplace_back(&batch, i);
    }
  }
  // A parameter that joins the rest can in turn share memory with others.
  for (size_t before = 0; before != rest_.size();) {
    before = rest_.size();
    merge(left);
    std::vector<Memory> more;
    const auto joins = [&](const auto& other) {
      const auto& [batch, i] = other;
      const auto& tensors = batch->tensors[i];
      std::vector<Memory> written = {memory_of(tensors.param)};
      for (const auto* buffer : tensors.slot) {
        if (buffer != nullptr) {
          written.push_back(memory_of(buffer));
        }
      }
      if (std::none_of(
              written.begin(), written.end(), [&](const Memory& memory) { return overlap(left, memory); })) {
        return false;
      }
      const auto& update = batch->updates[i];
      TORCH_CHECK_VALUE(
          !batch->kind.stochastic, function_, ": param_groups[", update.group, "]['params'][", update.index,
          "] or its ", keys_.names[0], " shares memory with a tensor that no kernel covers; ", keys_.dtype_option,
          " is not for these. Clone one of them.");
      rest_.push_back({update.group, update.index, py::reinterpret_borrow<py::object>(tensors.object)});
      more.insert(more.end(), written.begin(), written.end());
      return true;
    };
    others.erase(std::remove_if(others.begin(), others.end(), joins), others.end());
    left.insert(left.end(), more.begin(), more.end());
  }
  std::stable_sort(rest_.begin(), rest_.end(), [](const Rest& a, const Rest& b) {
    return std::tie(a.group, a.index) < std::tie(b.group, b.index);
  });
}

template <class Layout>
py::object ParamWalk<Layout>::rest() {
  leave_what_overlaps();
  py::list groups;
  int32_t current = -1;
  py::list params;
  for (const auto& [group, index, param] : rest_) {
    if (group != current) {
      current = group;
      params = py::list();
      groups.append(py::make_tuple(group, params));
    }
    params.append(param);
  }
  return groups;
}

template <class Layout>
void ParamWalk<Layout>::raise_no_memory(const Slot& slot, const TensorImpl* grad, const GroupUse& use) const {
  std::string what = !has_memory(slot.param) ? "" : "the gradient of ";
  for (int k = 0; k < kSlots && has_memory(slot.param) && has_memory(grad); ++k) {
    if (slot.held[k] != nullptr && !has_memory(slot.held[k])) {
      what = c10::str(keys_.names[k], " of ");
    }
  }
  TORCH_CHECK(
      false, function_, ": ", what, place(use, slot.index),
      " has more elements than its storage has memory for. Was the storage resized? Give the memory back before "
      "the step.");
}

// A step works element by element, so each process updates its part of a DTensor. The buffers in the state are
// DTensors too.
template <class Layout>
bool ParamWalk<Layout>::emit_local(const Slot& slot, const GroupUse& use) {
  if (slot.exact || Py_TYPE(slot.object) != dtensor_type()) {
    return false;
  }
  const auto grad = py::reinterpret_steal<py::object>(THPVariable_Wrap(slot.meta->grad_));
  const auto spec = py::handle(slot.object).attr("_spec");
  if (is_partial(spec)) {
    return false;
  }
  std::array<at::Tensor, 2 + kSlots> locals;
  std::array<PyObject*, 2 + kSlots> wholes = {slot.object, grad.ptr()};
  std::copy(slot.held_object.begin(), slot.held_object.end(), wholes.begin() + 2);
  for (size_t i = 0; i < wholes.size(); ++i) {
    const bool is_count_slot = kCounts && i == 2 + kBuffers;
    if (wholes[i] == nullptr || (is_count_slot && THPVariable_CheckExact(wholes[i]))) {
      continue;  // each process counts for itself
    }
    if (Py_TYPE(wholes[i]) != dtensor_type() || !same_placement(spec, py::handle(wholes[i]).attr("_spec"))) {
      return false;
    }
    locals[i] = local_of(wholes[i]);
  }
  Slot local = slot;
  local.param = locals[0].unsafeGetTensorImpl();
  local.grad = locals[1].unsafeGetTensorImpl();
  for (int k = 0; k < kSlots; ++k) {
    if (locals[2 + k].defined()) {
      local.held[k] = locals[2 + k].unsafeGetTensorImpl();
    }
  }
  if (!is_usual(local, use)) {
    return false;
  }
  push_unusual(local, local.grad, use, type_of(local.param), type_of(local.param));
  for (auto& tensor : locals) {
    if (tensor.defined()) {
      locals_.push_back(std::move(tensor));
    }
  }
  wrappers_.push_back(slot.param);
  for (auto* buffer : slot.held) {
    if (buffer != nullptr) {
      wrappers_.push_back(buffer);
    }
  }
  return true;
}

template <class Layout>
void ParamWalk<Layout>::check_fit(
    const char* what, const TensorImpl* tensor, const char* fix, const Slot& slot, const GroupUse& use) const {
  const auto* const param = slot.param;
  TORCH_CHECK_VALUE(
      tensor->sizes() == param->sizes(), function_, ": ", what, " of ", place(use, slot.index), " has shape ",
      tensor->sizes(), "; the parameter has ", param->sizes(), ". ", fix);
  TORCH_CHECK_VALUE(
      tensor->device() == param->device(), function_, ": ", what, " of ", place(use, slot.index), " is on ",
      tensor->device(), "; the parameter is on ", param->device(), ". ", fix);
  TORCH_CHECK_TYPE(
      c10::canCast(type_of(param), type_of(tensor)) && c10::canCast(type_of(tensor), type_of(param)), function_,
      ": ", what, " of ", place(use, slot.index), " is ", type_of(tensor), "; the parameter is ", type_of(param),
      ". ", fix);
}

template <class Layout>
void ParamWalk<Layout>::check_written(
    TensorImpl* tensor, const std::string& of, const Slot& slot, const GroupUse& use) const {
  if (!is_opaque(slot.param) && !is_opaque(tensor) && tensor->layout() == c10::kStrided) {
    TORCH_CHECK(
        at::has_internal_overlap(tensor) != at::MemOverlap::Yes, function_, ": ", of, place(use, slot.index),
        " is expanded: several of its elements are one place in memory. Clone it before optimizing it.");
  }
  TORCH_CHECK(
      c10::InferenceMode::is_enabled() || !tensor->is_inference(), function_, ": ", of, place(use, slot.index),
      " was made in inference mode. Inplace update to inference tensor outside InferenceMode is not allowed; "
      "clone it first.");
}

template <class Layout>
void ParamWalk<Layout>::check_buffer(int k, const Slot& slot, const GroupUse& use) const {
  TensorImpl* const buffer = slot.held[k];
  const char* const name = keys_.names[k];
  if (!is_opaque(slot.param)) {
    if (!is_opaque(buffer)) {
      check_fit(name, buffer, "Delete it from the optimizer's state, or give it the parameter's.", slot, use);
    }
    if (!is_opaque(slot.grad)) {
      const bool nested = buffer->key_set().has(c10::DispatchKey::NestedTensor);
      const bool dense =
          is_opaque(buffer) || slot.grad->layout() != c10::kStrided || buffer->layout() == c10::kStrided;
      TORCH_CHECK_TYPE(
          !nested && dense, function_, ": ", name, " of ", place(use, slot.index), " is ",
          nested ? "nested" : "not dense", "; the gradient is dense. Delete it from the optimizer's state.");
    }
  }
  check_written(buffer, c10::str(name, " of "), slot, use);
}

template <class Layout>
void ParamWalk<Layout>::emit_unusual(const Slot& slot, const GroupUse& use) {
  if (emit_local(slot, use)) {
    return;
  }
  TensorImpl* const param = slot.param;
  TensorImpl* const grad = slot.grad;
  // Bad input is refused here, before anything is written. Only opaque tensors are not checked, because only their
  // own operators know what fits them.
  if (!is_opaque(param) && !is_opaque(grad)) {
    check_fit("the gradient", grad, "Set .grad to None and run backward again.", slot, use);
  }
  check_written(param, "", slot, use);
  bool plain_buffers = true;
  bool fitting_buffers = true;
  for (int k = 0; k < kBuffers; ++k) {
    TensorImpl* const buffer = slot.held[k];
    if (buffer == nullptr) {
      continue;
    }
    check_buffer(k, slot, use);
    plain_buffers &= is_plain(buffer) && !buffer->is_inference() && THPVariable_CheckExact(slot.held_object[k]);
    // Only plain tensors are asked for their layout: others may have none, or code of their own that answers.
    fitting_buffers &=
        is_plain(param) && is_plain(buffer) && type_of(buffer) == type_of(param) && same_layout(param, buffer);
  }
  if (has_own_buffer_type(use) && use.buffers != 0) {
    emit_with_own_buffer(slot, use);
    return;
  }
  if (!has_usable_count(slot, use) || !is_plain(param) || !is_plain(grad) || !plain_buffers ||
      (!slot.exact && overrides_operators(slot.object)) || param->is_inference()) {
    leave(slot, use);
    return;
  }
  const auto type = type_of(param);
  if (!has_kernel(param->device().type()) || !has_kernel(param->device().type(), type, type_of(grad)) ||
      !param->is_non_overlapping_and_dense() || !fitting_buffers ||
      // Torch gives a new buffer the gradient's layout, so torch's form makes it.
      (use.buffers != 0 && slot.held[0] == nullptr && !same_layout(param, grad)) || is_rounded_otherwise(grad)) {
    leave(slot, use);
    return;
  }
  if (same_layout(param, grad)) {
    push_unusual(slot, grad, use, type, type_of(grad));
    return;
  }
  at::NoGradGuard no_grad;
  const auto& original = slot.meta->grad_;
  auto copy = at::empty_strided(param->sizes(), param->strides(), original.options().requires_grad(false));
  copy.copy_(original);
  push_unusual(slot, copy.unsafeGetTensorImpl(), use, type, type_of(grad));
  copied_.push_back({slot.meta, std::move(copy)});
}

// Torch has no form with buffers of another dtype, so what the kernels do not take is refused.
template <class Layout>
void ParamWalk<Layout>::emit_with_own_buffer(const Slot& slot, const GroupUse& use) {
  TensorImpl* const param = slot.param;
  const auto type = type_of(param);
  const char* const option = keys_.dtype_option;
  TORCH_CHECK_TYPE(
      is_plain(param) && is_plain(slot.grad) && (slot.exact || !overrides_operators(slot.object)) &&
          !param->is_inference() && has_kernel(param->device().type()) && has_kernel(type, true) &&
          param->is_non_overlapping_and_dense(),
      function_, ": ", place(use, slot.index), " is a ", type, " tensor (", Py_TYPE(slot.object)->tp_name, ") on ",
      param->device(), "; ", option, "=", use.buffer_type,
      " is for dense float32 and bfloat16 parameters on the CPU or CUDA. Put it in a group of ", option, "=None.");
  TORCH_CHECK_VALUE(
      has_usable_count(slot, use), function_, ": the state of ", place(use, slot.index),
      " has some of its tensors and lacks others, or a ", keys_.names[kSlots - 1],
      " that is not one float32 on the CPU or the parameter's device; ", option,
      " is not for these. Delete the parameter's entry from the optimizer's state.");
  at::NoGradGuard no_grad;
  Slot fitting = slot;
  std::array<at::Tensor, kBuffers> converted;
  for (int k = 0; k < kBuffers; ++k) {
    TensorImpl* const buffer = slot.held[k];
    if (buffer == nullptr || (type_of(buffer) == use.buffer_type && same_layout(param, buffer) &&
                              is_plain(buffer) && !buffer->is_inference())) {
      continue;
    }
    converted[k] = at::empty_strided(
        param->sizes(), param->strides(), at::TensorOptions().dtype(use.buffer_type).device(param->device()));
    converted[k].copy_(THPVariable_Unpack(slot.held_object[k]));
    held_objects_.push_back(py::reinterpret_steal<py::object>(THPVariable_Wrap(converted[k])));
    fitting.held_object[k] = held_objects_.back().ptr();
    fitting.held[k] = converted[k].unsafeGetTensorImpl();
  }
  const auto& grad = slot.meta->grad_;
  at::Tensor copy;
  if (type_of(slot.grad) != type || !same_layout(param, slot.grad)) {
    copy = at::empty_strided(param->sizes(), param->strides(), grad.options().dtype(type).requires_grad(false));
    copy.copy_(grad);
  }
  const size_t had_fresh = fresh_.size();
  const size_t had_rest = rest_.size();
  push_unusual(fitting, copy.defined() ? copy.unsafeGetTensorImpl() : slot.grad, use, type, type);
  TORCH_CHECK_VALUE(
      rest_.size() == had_rest, function_, ": ", place(use, slot.index), ", its gradient or its ", keys_.names[0],
      " lies in memory that is not aligned to its elements, or the buffer shares memory with the others; ", option,
      " is not for these. Clone them.");
  if (std::any_of(converted.begin(), converted.end(), [](const at::Tensor& made) { return made.defined(); })) {
    if (fresh_.size() == had_fresh) {
      const auto& batch = batch_for(device_of_plain(param), type, type, use);
      const auto batch_index = static_cast<size_t>(&batch - batches_.data());
      fresh_.push_back({slot.object, slot.state, batch_index, batch.updates.size() - 1, use.buffers});
      for (int k = 0; k < kSlots; ++k) {
        if (is_used(k, use)) {
          fresh_.back().held[k] = THPVariable_Unpack(fitting.held_object[k]);
        }
      }
    }
    fresh_.back().enter = true;
  }
  if (copy.defined()) {
    copied_.push_back({slot.meta, std::move(copy)});
  }
}

// param_walk.cpp instantiates the class; these are the members that it does not define.
template void ParamWalk<StateLayout<1, false>>::leave(const Slot&, const GroupUse&);
template void ParamWalk<StateLayout<1, false>>::emit_unusual(const Slot&, const GroupUse&);
template void ParamWalk<StateLayout<1, false>>::raise_no_memory(
    const Slot&, TensorImpl const*, const GroupUse&) const;
template py::object ParamWalk<StateLayout<1, false>>::rest();
template void ParamWalk<StateLayout<3, true>>::leave(const Slot&, const GroupUse&);
template void ParamWalk<StateLayout<3, true>>::emit_unusual(const Slot&, const GroupUse&);
template void ParamWalk<StateLayout<3, true>>::raise_no_memory(
    const Slot&, TensorImpl const*, const GroupUse&) const;
template py::object ParamWalk<StateLayout<3, true>>::rest();

}  // namespace torch_freeze
