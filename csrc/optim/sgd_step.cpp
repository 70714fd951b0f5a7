#include "optim/sgd_step.h"

#include <ATen/ops/scalar_tensor.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <vector>

#include "core/param_walk.h"

#ifdef WITH_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace torch_freeze {
namespace {

namespace py = pybind11;

constexpr const char* kStep = "FrozenAwareSGD.step";

// From this many elements on, other Python threads may run while the CPU computes.
constexpr int64_t kReleaseGilNumel = 1 << 20;

// What a param group holds, in the order in which torch.optim.SGD enters it.
enum Key : size_t {
  kParams,
  kLr,
  kMomentum,
  kDampening,
  kWeightDecay,
  kNesterov,
  kMaximize,
  kForeach,
  kDifferentiable,
  kFused
};
constexpr std::array<const char*, 10> kKeyNames = {"params",         "lr",       "momentum", "dampening",
                                                   "weight_decay",   "nesterov", "maximize", "foreach",
                                                   "differentiable", "fused"};

PyObject* intern(const char* text) {
  PyObject* key = PyUnicode_InternFromString(text);
  if (key == nullptr) {
    throw py::error_already_set();
  }
  return key;
}

// Interned once: a look-up then compares pointers.
const std::array<PyObject*, kKeyNames.size()>& keys() {
  static const auto interned = [] {
    std::array<PyObject*, kKeyNames.size()> all{};
    std::transform(kKeyNames.begin(), kKeyNames.end(), all.begin(), intern);
    return all;
  }();
  return interned;
}

// What a group may hold besides.
enum Extra : size_t { kFrozenMomentum, kMomentumDtype, kMomentumSeed };
constexpr std::array<const char*, 3> kExtraNames = {"frozen_momentum", "momentum_dtype", "momentum_seed"};

const std::array<PyObject*, kExtraNames.size()>& extra_keys() {
  static const auto interned = [] {
    std::array<PyObject*, kExtraNames.size()> all{};
    std::transform(kExtraNames.begin(), kExtraNames.end(), all.begin(), intern);
    return all;
  }();
  return interned;
}

// What becomes of the momentum of frozen parameters.
enum class FrozenMomentum : uint8_t { kKeep, kReset, kDrop };

// One param group, read afresh at every step.
class GroupReader {
 public:
  GroupReader(PyObject* group, int32_t index) : index_(index) {
    if (!PyDict_Check(group)) {
      throw py::type_error(
          c10::str(kStep, ": param_groups[", index, "] is a ", Py_TYPE(group)->tp_name, "; it has to be a dict"));
    }
    // The dict in its own order is the keys in theirs, with others between: one pass, no look-ups.
    const auto& wanted = keys();
    PyObject* key = nullptr;
    PyObject* value = nullptr;
    Py_ssize_t position = 0;
    size_t next = 0;
    while (PyDict_Next(group, &position, &key, &value) != 0) {
      if (next < wanted.size() && key == wanted[next]) {
        values_[next++] = value;
      } else {
        note_extra(key, value);
      }
    }
    for (; next < wanted.size(); ++next) {
      values_[next] = PyDict_GetItemWithError(group, wanted[next]);
      if (values_[next] == nullptr) {
        if (PyErr_Occurred() == nullptr) {
          PyErr_Format(PyExc_KeyError, "%s: param_groups[%d] has no '%s'", kStep, index_, kKeyNames[next]);
        }
        throw py::error_already_set();
      }
    }
  }

  GroupReader(const GroupReader&) = delete;
  GroupReader& operator=(const GroupReader&) = delete;
  ~GroupReader() {
    if (kept_) {
      std::for_each(values_.begin(), values_.end(), [](PyObject* value) { Py_DECREF(value); });
      std::for_each(extras_.begin(), extras_.end(), [](PyObject* value) { Py_XDECREF(value); });
    }
  }

  PyObject* item(Key key) const { return values_[key]; }

  bool flag(Key key) const {
    PyObject* value = item(key);
    if (value == Py_False || value == Py_None) {
      return false;
    }
    if (value == Py_True) {
      return true;
    }
    keep();
    const int truth = PyObject_IsTrue(value);
    if (truth < 0) {
      throw py::error_already_set();
    }
    return truth != 0;
  }

  // The tensor under `key`, or null where it is a plain number.
  const at::Tensor* tensor(Key key) const {
    PyObject* value = item(key);
    if (PyFloat_CheckExact(value) || PyLong_CheckExact(value) || !THPVariable_Check(value)) {
      return nullptr;
    }
    keep();
    const auto& tensor = THPVariable_Unpack(value);
    TORCH_CHECK_VALUE(
        tensor.numel() == 1, kStep, ": ", kKeyNames[key], " of param_groups[", index_, "] is a tensor of ",
        tensor.numel(), " elements; Tensor lr must be 1-element");
    return &tensor;
  }

  double number(Key key) const {
    PyObject* value = item(key);
    if (PyFloat_CheckExact(value)) {
      return PyFloat_AS_DOUBLE(value);
    }
    if (is_small_int(value)) {
      return static_cast<double>(PyLong_AsLong(value));
    }
    if (const auto* found = tensor(key)) {
      TORCH_CHECK_TYPE(
          !found->is_complex(), kStep, ": ", kKeyNames[key], " of param_groups[", index_, "] is a ",
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
              kStep, ": ", kKeyNames[key], " of param_groups[", index_, "] is a ", Py_TYPE(value)->tp_name,
              "; it has to be a number"));
    }
    return number;
  }

  // 1 - dampening, rounded as Python rounds it: a NumPy or tensor scalar has a precision of its own.
  double undamped() const {
    PyObject* value = item(kDampening);
    if (PyFloat_CheckExact(value)) {
      return 1.0 - PyFloat_AS_DOUBLE(value);
    }
    if (is_small_int(value)) {
      return 1.0 - static_cast<double>(PyLong_AsLong(value));
    }
    number(kDampening);  // says what is wrong with it, if anything is
    return py::cast<double>(py::float_(py::int_(1) - py::reinterpret_borrow<py::object>(value)));
  }

  bool wants_gradient(Key key) const {
    const auto* found = tensor(key);
    return found != nullptr && found->requires_grad();
  }

  FrozenMomentum frozen_momentum() const {
    PyObject* const value = extras_[kFrozenMomentum];
    if (value == nullptr) {
      return FrozenMomentum::kKeep;
    }
    const std::string name = PyUnicode_Check(value) ? py::cast<std::string>(value) : "";
    TORCH_CHECK_VALUE(
        name == "keep" || name == "reset" || name == "drop", kStep, ": frozen_momentum of param_groups[", index_,
        "] is ", py::cast<std::string>(py::repr(value)), "; it has to be 'keep', 'reset' or 'drop'");
    return name == "keep"    ? FrozenMomentum::kKeep
           : name == "reset" ? FrozenMomentum::kReset
                             : FrozenMomentum::kDrop;
  }

  // Undefined: the parameter's own.
  c10::ScalarType momentum_type() const {
    PyObject* const value = extras_[kMomentumDtype];
    if (value == nullptr || value == Py_None) {
      return c10::ScalarType::Undefined;
    }
    TORCH_CHECK_VALUE(
        THPDtype_Check(value) && reinterpret_cast<THPDtype*>(value)->scalar_type == c10::kBFloat16, kStep,
        ": momentum_dtype of param_groups[", index_, "] is ", py::cast<std::string>(py::repr(value)),
        "; it has to be torch.bfloat16 or None");
    return c10::kBFloat16;
  }

  uint64_t momentum_seed() const {
    PyObject* const value = extras_[kMomentumSeed];
    if (value == nullptr) {
      return 0;
    }
    TORCH_CHECK_VALUE(
        PyLong_Check(value), kStep, ": momentum_seed of param_groups[", index_, "] is a ", Py_TYPE(value)->tp_name,
        "; it has to be an int");
    return PyLong_AsUnsignedLongLongMask(value);
  }

  // Stock's own implementation is asked for, or a derivative that only its separate operators have.
  bool wants_stock_form() const {
    const bool kernels = item(kFused) == Py_None ? item(kForeach) == Py_None : flag(kFused);
    return !kernels || flag(kDifferentiable) || wants_gradient(kLr) || wants_gradient(kWeightDecay);
  }

 private:
  void note_extra(PyObject* key, PyObject* value) {
    // Of two interned strings, or a string and itself, the pointers tell.
    for (size_t i = 0; i < extras_.size(); ++i) {
      PyObject* const wanted = extra_keys()[i];
      if (key == wanted ||
          (PyUnicode_CheckExact(key) && !PyUnicode_CHECK_INTERNED(key) && PyUnicode_Compare(key, wanted) == 0)) {
        extras_[i] = value;
      }
    }
  }
  // One whose every sum and conversion is exact.
  static bool is_small_int(PyObject* value) {
    int overflow = 0;
    return PyLong_CheckExact(value) && std::abs(PyLong_AsLongAndOverflow(value, &overflow)) < (1L << 30) &&
           overflow == 0;
  }
  // Reading anything but a plain number can run a user's code, and that can take the values out of the group.
  void keep() const {
    if (!kept_) {
      kept_ = true;
      std::for_each(values_.begin(), values_.end(), [](PyObject* value) { Py_INCREF(value); });
      std::for_each(extras_.begin(), extras_.end(), [](PyObject* value) { Py_XINCREF(value); });
    }
  }

  std::array<PyObject*, kKeyNames.size()> values_{};
  std::array<PyObject*, kExtraNames.size()> extras_{};  // null where the group has none
  int32_t index_;
  mutable bool kept_ = false;
};

// One step's working memory, kept for its capacity alone.
struct StepWork {
  ParamWalk walk{kStep, intern("momentum_buffer")};
  std::vector<SgdGroup> groups;
  std::vector<std::pair<py::object, GroupUse>> params;  // per group
  std::vector<std::pair<size_t, FrozenMomentum>>
      policies;                                        // of the groups, by index into `params`, that do not keep
  std::vector<std::pair<py::object, uint64_t>> seeds;  // of the groups that round stochastically
  std::vector<at::Tensor> device_lrs;                  // per group; undefined where lr is a number
  bool has_device_lr = false;
  bool rounds_stochastically = false;
};

// A mode or a function transform wants to see every operator, and may give back tensors of its own.
bool is_intercepted() {
  constexpr c10::DispatchKeySet interceptors(
      {c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot, c10::DispatchKey::Functionalize,
       c10::DispatchKey::FuncTorchDynamicLayerFrontMode, c10::DispatchKey::FuncTorchDynamicLayerBackMode});
  return c10::impl::tls_local_dispatch_key_set().included_.has_any(interceptors);
}

// Whether a tensor's bytes are its value: a wrapper or a zero tensor may have none, and a negation may be pending.
bool holds_its_value(const at::Tensor& tensor) {
  return !tensor.is_neg() && !tensor.is_conj() && !tensor.key_set().has(c10::DispatchKey::Python) &&
         tensor.has_storage() && tensor.storage().data() != nullptr;
}

// A GradScaler's scalar as one float on `device`, whatever it came as.
at::Tensor on_device(const py::object& scalar, c10::Device device) {
  at::Tensor tensor = THPVariable_Check(scalar.ptr()) ? THPVariable_Unpack(scalar.ptr()).detach()
                                                      : at::scalar_tensor(py::cast<double>(scalar), at::kFloat);
  TORCH_CHECK_VALUE(
      tensor.numel() == 1, kStep, ": grad_scale and found_inf hold one number; got ", tensor.numel());
  if (!holds_its_value(tensor)) {
    tensor = at::scalar_tensor(tensor.item<double>(), at::kFloat);
  }
  return tensor.to(device, at::kFloat);
}

// A captured step is replayed as it was recorded, with what the host decided then. Only the devices that
// `concerns` picks are asked, for asking makes a CUDA context on a device that has none.
template <class Concerns>
void refuse_capture(const std::vector<WalkBatch>& batches, const Concerns& concerns, const char* why) {
  for (const auto& batch : batches) {
    TORCH_CHECK(
        !concerns(batch) || !is_capturing(batch.launch.device), kStep,
        " while a CUDA graph is being captured: ", why);
  }
}

void launch(const UpdateBatch& batch) {
  if (batch.device.is_cuda()) {
#ifdef WITH_CUDA
    sgd_step_cuda(batch);
#endif
  } else {
    sgd_step_cpu(batch);
  }
}

// Tensors that share memory are updated one after the other, as stock does.
void launch_in_order(const UpdateBatch& batch) {
  UpdateBatch one = batch;
  one.count = 1;
  for (int64_t i = 0; i < batch.count; ++i) {
    one.updates = batch.updates + i;
    one.numel = batch.updates[i].numel;
    launch(one);
  }
}

void run(StepWork& work, const py::object& grad_scale, const py::object& found_inf, bool in_order) {
  int64_t cpu_numel = 0;
  for (const auto& batch : work.walk.batches()) {
    cpu_numel += batch.launch.device.is_cpu() ? batch.launch.numel : 0;
  }
  const auto launch_all = [&] {
    for (auto& batch : work.walk.batches()) {
      UpdateBatch& update = batch.launch;
      if (batch.updates.empty()) {
        continue;
      }
      update.updates = batch.updates.data();
      update.count = static_cast<int64_t>(batch.updates.size());
      update.groups = work.groups.data();
      update.group_count = static_cast<int64_t>(work.groups.size());
      at::Tensor scale;
      at::Tensor inf;
      if (!grad_scale.is_none()) {
        scale = on_device(grad_scale, update.device);
      }
      if (!found_inf.is_none()) {
        inf = on_device(found_inf, update.device);
      }
      update.grad_scale = scale.defined() ? scale.const_data_ptr<float>() : nullptr;
      update.found_inf = inf.defined() ? inf.const_data_ptr<float>() : nullptr;
      std::vector<SgdGroup> host_groups;
      if (work.has_device_lr) {
        // A learning rate on another device is fetched, as stock fetches it.
        host_groups = work.groups;
        for (size_t i = 0; i < host_groups.size(); ++i) {
          const auto& lr = work.device_lrs[i];
          if (lr.defined() && lr.device() != update.device) {
            host_groups[i].lr = lr.item<double>();
            host_groups[i].device_lr = nullptr;
          }
        }
        update.groups = host_groups.data();
      }
      in_order ? launch_in_order(update) : launch(update);
    }
  };
  if (cpu_numel >= kReleaseGilNumel && grad_scale.is_none() && found_inf.is_none() && !work.has_device_lr) {
    const auto held = work.walk.hold_storages();
    work.walk.bump_versions();
    work.walk.drop_frozen_grads();
    py::gil_scoped_release release;
    launch_all();
  } else {
    launch_all();
    work.walk.bump_versions();
    if (!grad_scale.is_none()) {
      work.walk.return_copied_grads();
    }
    work.walk.drop_frozen_grads();
  }
}

// Reads what a group's kernels take. `lr` is the learning rate where it stays on its device, else null.
SgdGroup read_group(const GroupReader& reader, size_t index, const at::Tensor*& device_lr) {
  SgdGroup group;
  const at::Tensor* lr = reader.tensor(kLr);
  device_lr = nullptr;
  if (lr != nullptr && lr->is_cuda() && (lr->scalar_type() == at::kFloat || lr->scalar_type() == at::kDouble) &&
      holds_its_value(*lr)) {
    device_lr = lr;
    group.device_lr = lr->const_data_ptr();
    group.device_lr_is_double = lr->scalar_type() == at::kDouble;
  } else {
    group.lr = reader.number(kLr);
  }
  group.momentum = reader.number(kMomentum);
  group.undamped = reader.undamped();
  group.weight_decay = reader.number(kWeightDecay);
  group.nesterov = reader.flag(kNesterov);
  group.maximize = reader.flag(kMaximize);
  if (reader.momentum_type() != c10::ScalarType::Undefined) {
    // Groups may have been given the same seed, and their parameters the same places.
    group.rounding_seed = reader.momentum_seed() + (static_cast<uint64_t>(index) << 48);
  }
  return group;
}

UsedGroup as_used(const SgdGroup& group, const at::Tensor* device_lr) {
  UsedGroup used;
  used.used = true;
  used.group = group;
  if (device_lr != nullptr) {
    used.lr = device_lr->unsafeGetTensorImpl();
    used.lr_version = device_lr->is_inference() ? 0 : device_lr->_version();
  }
  return used;
}

void check_same(const UsedGroup& before, const UsedGroup& now, size_t index) {
  const auto same = [](double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); };
  const auto& a = before.group;
  const auto& b = now.group;
  const char* changed =
      !same(a.lr, b.lr) || a.device_lr != b.device_lr || before.lr != now.lr || before.lr_version != now.lr_version
          ? kKeyNames[kLr]
      : !same(a.momentum, b.momentum)         ? kKeyNames[kMomentum]
      : !same(a.undamped, b.undamped)         ? kKeyNames[kDampening]
      : !same(a.weight_decay, b.weight_decay) ? kKeyNames[kWeightDecay]
      : a.nesterov != b.nesterov              ? kKeyNames[kNesterov]
      : a.maximize != b.maximize              ? kKeyNames[kMaximize]
                                              : nullptr;
  TORCH_CHECK(
      changed == nullptr, kStep, ": ", changed, " of param_groups[", index,
      "] was changed while a step was under way: with step_in_backward, backward has applied a part of the "
      "gradients with what it was before. Change it after step() or before backward(); set it back to make this "
      "step.");
}

void check_number_of_groups(const py::list& param_groups, const UsedGroups& used) {
  TORCH_CHECK(
      used.size() <= param_groups.size(), kStep, ": there are ", param_groups.size(), " param_groups, and were ",
      used.size(), " when backward applied a part of the gradients. Remove groups after step().");
}

// What is left to do after a step, one that an overflow withheld included: a GPU does not tell the host of those.
// `overlap` is what has_overlap() said: a parameter that is listed twice counts as two that have a state.
void settle(StepWork& work, bool overlap) {
  if (!work.policies.empty() && (overlap || work.walk.has_idle_state())) {
    for (const auto& [index, policy] : work.policies) {
      PyObject* const params = work.params[index].first.ptr();
      policy == FrozenMomentum::kReset ? work.walk.mark_frozen(params) : work.walk.drop_frozen(params);
    }
  }
  for (const auto& [group, seed] : work.seeds) {
    const auto next = py::int_(seed + 1);
    if (PyDict_SetItem(group.ptr(), extra_keys()[kMomentumSeed], next.ptr()) != 0) {
      throw py::error_already_set();
    }
  }
}

py::object step(
    StepWork& work, const py::list& param_groups, const py::dict& state, const py::object& grad_scale,
    const py::object& found_inf, const std::optional<py::list>& done, const Selection* selection,
    UsedGroups* used) {
  work.walk.reset(state.ptr());
  work.groups.clear();
  work.params.clear();
  work.policies.clear();
  work.seeds.clear();
  work.device_lrs.clear();
  work.has_device_lr = false;
  work.rounds_stochastically = false;
  if (done) {
    work.walk.skip(*done);
  }
  const bool intercepted = is_intercepted();
  size_t part = 0;
  // All hyper-parameters first: reading one can run a user's code, which must not change what has been walked.
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(param_groups.ptr()); ++i) {
    SgdGroup& group = work.groups.emplace_back();
    const bool selected =
        selection != nullptr && part < selection->parts.size() && selection->parts[part].group == i;
    if (selection != nullptr && !selected) {
      continue;
    }
    const GroupReader reader(PyList_GET_ITEM(param_groups.ptr(), i), static_cast<int32_t>(i));
    GroupUse use;
    use.index = static_cast<int32_t>(i);
    use.stock_form = intercepted || reader.wants_stock_form();
    if (!use.stock_form || selected) {
      const at::Tensor* device_lr = nullptr;
      group = read_group(reader, i, device_lr);
      if (device_lr != nullptr) {
        work.has_device_lr = true;
        work.device_lrs.resize(i);
        work.device_lrs.push_back(*device_lr);
      }
      if (selected) {
        used->resize(std::max(used->size(), static_cast<size_t>(i) + 1));
        const auto now = as_used(group, device_lr);
        if ((*used)[i].used) {
          check_same((*used)[i], now, i);
        }
        (*used)[i] = now;
      }
      use.has_buffer = group.momentum != 0;
    }
    if (use.has_buffer || use.stock_form) {
      use.momentum_type = reader.momentum_type();
      TORCH_CHECK_VALUE(
          use.momentum_type == c10::ScalarType::Undefined || !use.stock_form, kStep, ": param_groups[", i,
          "] has a momentum_dtype and asks for stock's own form (foreach, fused=False, differentiable, or a "
          "mode that wants to see every operator), which has none. Set momentum_dtype to None, or foreach and "
          "fused.");
      work.rounds_stochastically |= use.momentum_type != c10::ScalarType::Undefined;
      if (selection == nullptr && use.momentum_type != c10::ScalarType::Undefined) {
        work.seeds.emplace_back(
            py::reinterpret_borrow<py::object>(PyList_GET_ITEM(param_groups.ptr(), i)), reader.momentum_seed());
      }
    }
    if (const auto policy = reader.frozen_momentum(); policy != FrozenMomentum::kKeep && selection == nullptr) {
      work.policies.emplace_back(work.params.size(), policy);
    }
    if (selected) {
      use.positions = selection->parts[part].positions.data();
      work.params.emplace_back(selection->parts[part++].params, use);
    } else {
      work.params.emplace_back(py::reinterpret_borrow<py::object>(reader.item(kParams)), use);
    }
  }
  work.device_lrs.resize(work.groups.size());
  for (const auto& [params, use] : work.params) {
    work.walk.add_group(params.ptr(), use);
  }
  if (work.walk.has_rest()) {
    return work.walk.rest();
  }
  // Before anything is read from a device, which a capture does not allow either.
  if (work.walk.has_fresh()) {
    refuse_capture(
        work.walk.batches(), [&](const WalkBatch& batch) { return work.walk.has_fresh(batch); },
        "momentum buffers are missing, and would start from zero at every replay. Make a step before the capture, "
        "so that they are there.");
  }
  if (work.rounds_stochastically) {
    refuse_capture(
        work.walk.batches(), [](const WalkBatch& batch) { return batch.launch.stochastic; },
        "every replay would round momentum with the same random bits. Use momentum_dtype=None.");
  }
  // An overflow must leave no trace, a new buffer included. On a GPU asking costs a synchronisation, so it is
  // asked only where there are buffers to be made: never in a steady state.
  if (!found_inf.is_none() && work.walk.has_fresh() && on_device(found_inf, c10::kCPU).item<float>() != 0) {
    const bool overlap = work.walk.has_overlap();
    work.walk.drop_frozen_grads();
    settle(work, overlap);
    return py::none();
  }
  const bool overlap = work.walk.has_overlap();
  work.walk.make_fresh_buffers(overlap);
  run(work, grad_scale, found_inf, overlap);
  work.walk.unmark_fresh();
  settle(work, overlap);
  return py::none();
}

// With the working memory of this thread.
py::object step_in_thread(
    const py::list& param_groups, const py::dict& state, const py::object& grad_scale, const py::object& found_inf,
    const std::optional<py::list>& done, const Selection* selection, UsedGroups* used) {
  static thread_local StepWork shared;
  static thread_local bool busy = false;
  if (busy) {
    // A step within a step, from code that letting go of a gradient ran.
    StepWork own;
    return step(own, param_groups, state, grad_scale, found_inf, done, selection, used);
  }
  struct Guard {
    Guard() { busy = true; }
    ~Guard() {
      shared.walk.reset(nullptr);  // holds no tensor until the next step
      shared.device_lrs.clear();
      shared.params.clear();
      shared.seeds.clear();
      busy = false;
    }
  } guard;
  return step(shared, param_groups, state, grad_scale, found_inf, done, selection, used);
}

}  // namespace

py::object sgd_step(
    const py::list& param_groups, const py::dict& state, const py::object& grad_scale, const py::object& found_inf,
    const std::optional<py::list>& done, bool unless_observed) {
  if (unless_observed && is_observed()) {
    return py::reinterpret_borrow<py::object>(Py_NotImplemented);
  }
  return step_in_thread(param_groups, state, grad_scale, found_inf, done, nullptr, nullptr);
}

py::object sgd_step_part(
    const py::list& param_groups, const py::dict& state, const Selection& selection, UsedGroups& used,
    const std::optional<py::list>& done) {
  check_number_of_groups(param_groups, used);
  return step_in_thread(param_groups, state, py::none(), py::none(), done, &selection, &used);
}

void check_unchanged(const py::list& param_groups, const UsedGroups& used) {
  check_number_of_groups(param_groups, used);
  for (size_t i = 0; i < used.size(); ++i) {
    if (used[i].used) {
      const GroupReader reader(
          PyList_GET_ITEM(param_groups.ptr(), static_cast<Py_ssize_t>(i)), static_cast<int32_t>(i));
      const at::Tensor* device_lr = nullptr;
      const auto group = read_group(reader, i, device_lr);
      check_same(used[i], as_used(group, device_lr), i);
    }
  }
}

void zero_grad(const py::list& param_groups, const py::dict& state, bool set_to_none) {
  std::vector<at::Tensor> dropped;
  std::vector<py::list> momentum_not_kept;
  for (Py_ssize_t g = 0; g < PyList_GET_SIZE(param_groups.ptr()); ++g) {
    const auto group = py::reinterpret_borrow<py::dict>(PyList_GET_ITEM(param_groups.ptr(), g));
    const auto params = py::cast<py::list>(group["params"]);
    for (const auto param : params) {
      if (!THPVariable_Check(param.ptr())) {
        throw py::type_error(
            c10::str(
                "FrozenAwareSGD.zero_grad: param_groups[", g, "]['params'] holds a ",
                Py_TYPE(param.ptr())->tp_name, "; an optimizer takes tensors"));
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
    PyObject* const policy = PyDict_GetItemWithError(group.ptr(), extra_keys()[kFrozenMomentum]);
    if (policy != nullptr && PyUnicode_Check(policy) && PyUnicode_CompareWithASCIIString(policy, "drop") == 0) {
      momentum_not_kept.push_back(params);
    }
  }
  if (!momentum_not_kept.empty()) {
    ParamWalk walk{"FrozenAwareSGD.zero_grad", intern("momentum_buffer")};
    walk.reset(state.ptr());
    for (const auto& params : momentum_not_kept) {
      walk.drop_frozen(params.ptr());
    }
  }
}

bool is_capturing([[maybe_unused]] c10::Device device) {
#ifdef WITH_CUDA
  if (device.is_cuda()) {
    const c10::cuda::CUDAGuard guard(device);
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    C10_CUDA_CHECK(cudaStreamIsCapturing(c10::cuda::getCurrentCUDAStream(device.index()), &status));
    return status != cudaStreamCaptureStatusNone;
  }
#endif
  return false;
}

bool is_observed() { return at::getStepCallbacksUnlessEmpty(at::RecordScope::USER_SCOPE).has_value(); }

}  // namespace torch_freeze
