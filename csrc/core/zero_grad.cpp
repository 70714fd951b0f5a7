#include "core/zero_grad.h"

#include <torch/csrc/autograd/python_variable.h>

#include <vector>

namespace torch_freeze {

namespace py = pybind11;

void zero_grad(
    const char* function, const GroupKeys& group_keys, const StateKeys& state_keys, const py::list& param_groups,
    const py::dict& state, bool set_to_none) {
  std::vector<at::Tensor> dropped;
  std::vector<py::list> state_not_kept;
  for (Py_ssize_t g = 0; g < PyList_GET_SIZE(param_groups.ptr()); ++g) {
    const auto group = py::reinterpret_borrow<py::dict>(PyList_GET_ITEM(param_groups.ptr(), g));
    const auto params = py::cast<py::list>(group["params"]);
    for (const auto param : params) {
      if (!THPVariable_Check(param.ptr())) {
        throw py::type_error(
            c10::str(
                function, ": param_groups[", g, "]['params'] holds a ", Py_TYPE(param.ptr())->tp_name,
                "; an optimizer takes tensors"));
      }
      at::Tensor& grad = THPVariable_Unpack(param.ptr()).mutable_grad();
      if (!grad.defined()) {
        continue;
      }
      if (set_to_none) {
        dropped.push_back(std::move(grad));
        grad = at::Tensor();
      } else {
        if (grad.grad_fn() != nullptr) {
          grad.detach_();
        } else {
          grad.requires_grad_(false);
        }
        grad.zero_();
      }
    }
    PyObject* const policy = PyDict_GetItemWithError(group.ptr(), group_keys.extra_keys[GroupKeys::kFrozenState]);
    if (policy != nullptr && PyUnicode_Check(policy) && PyUnicode_CompareWithASCIIString(policy, "drop") == 0) {
      state_not_kept.push_back(params);
    }
  }
  for (const auto& params : state_not_kept) {
    drop_frozen(state.ptr(), params.ptr(), state_keys);
  }
}

}  // namespace torch_freeze
