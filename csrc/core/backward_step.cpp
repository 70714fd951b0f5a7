#include "core/backward_step.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_foreach_clamp_max.h>
#include <ATen/ops/_foreach_clamp_min.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/full.h>
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <typeinfo>
#include <utility>

#include "core/observers.h"
#include "core/overlap.h"

namespace torch_freeze {
namespace py = pybind11;
using c10::TensorImpl;
using torch::autograd::AutogradMeta;
using torch::autograd::PostAccumulateGradHook;

namespace {

// The default size of a bucket: this fraction of the trainable bytes, up to a limit. Gradients that are applied
// while they are still in the cache are not read from memory again. On the CPU 1 to 4 MiB measured best
// (benchmarks/NOTES.md); a GPU has a larger cache, and its launches cost more.
constexpr int64_t kBucketsAtLeast = 10;
constexpr int64_t kLargestBucketCpu = int64_t{4} << 20;
constexpr int64_t kLargestBucket = int64_t{32} << 20;

AutogradMeta* meta_of(const at::Tensor& tensor) { return torch::autograd::impl::get_autograd_meta(tensor); }

std::string place(int32_t group, Py_ssize_t position) {
  return c10::str("param_groups[", group, "]['params'][", position, "]");
}

c10::weak_intrusive_ptr<TensorImpl, c10::UndefinedTensorImpl> weak(const at::Tensor& tensor) {
  return c10::weak_intrusive_ptr<TensorImpl, c10::UndefinedTensorImpl>(tensor.getIntrusivePtr());
}

uint32_t version_of(const TensorImpl* tensor) {
  const auto& counter = tensor->version_counter();
  return counter.enabled() ? counter.current_version() : 0;
}

uint32_t version_of(const at::Tensor& tensor) { return version_of(tensor.unsafeGetTensorImpl()); }

int64_t bytes_of(const at::Tensor& tensor) { return tensor.numel() * static_cast<int64_t>(tensor.element_size()); }

// Whether the backward of a Python function is on the stack. Reentrant checkpoints run a backward inside one.
bool is_within_python_backward() {
  const py::gil_scoped_acquire gil;
  static const auto* const apply = new py::object(
      py::module_::import("torch.autograd.function").attr("BackwardCFunction").attr("apply").attr("__code__"));
  auto frame = py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(PyEval_GetFrame()));
  while (frame) {
    auto* const raw = reinterpret_cast<PyFrameObject*>(frame.ptr());
    const auto code = py::reinterpret_steal<py::object>(reinterpret_cast<PyObject*>(PyFrame_GetCode(raw)));
    if (code.is(*apply)) {
      return true;
    }
    frame = py::reinterpret_steal<py::object>(reinterpret_cast<PyObject*>(PyFrame_GetBack(raw)));
  }
  return false;
}

// A group's parameters: a list or a tuple.
py::object list_of(const py::list& param_groups, Py_ssize_t group) {
  const py::handle item = PyList_GET_ITEM(param_groups.ptr(), group);
  py::object params = item["params"];
  if (!PyList_Check(params.ptr()) && !PyTuple_Check(params.ptr())) {
    throw py::type_error(
        c10::str(
            "step: param_groups[", group, "]['params'] is a ", Py_TYPE(params.ptr())->tp_name,
            "; give it a list of tensors"));
  }
  return params;
}

// Calls `visit(object, group, position)` for every tensor in the lists.
template <class Visit>
void for_each_param(const py::list& param_groups, Visit&& visit) {
  for (Py_ssize_t g = 0; g < PyList_GET_SIZE(param_groups.ptr()); ++g) {
    const auto params = list_of(param_groups, g);
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(params.ptr()); ++i) {
      PyObject* const param = PySequence_Fast_GET_ITEM(params.ptr(), i);
      if (THPVariable_Check(param)) {
        visit(param, static_cast<int32_t>(g), i);
      }
    }
  }
}

// The tensor at a place in the lists, or null.
PyObject* param_at(const py::list& param_groups, int32_t group, Py_ssize_t position) {
  if (group >= PyList_GET_SIZE(param_groups.ptr())) {
    return nullptr;
  }
  const auto params = list_of(param_groups, group);
  PyObject* const param = position < PySequence_Fast_GET_SIZE(params.ptr())
                              ? PySequence_Fast_GET_ITEM(params.ptr(), position)
                              : nullptr;
  return param != nullptr && THPVariable_Check(param) ? param : nullptr;
}

}  // namespace

// A tensor has one place for such hooks. This one takes it and first runs the hook that was there before.
class GradientHook : public PostAccumulateGradHook {
 public:
  GradientHook(
      std::shared_ptr<BackwardStep> owner, const at::Tensor& param, std::unique_ptr<PostAccumulateGradHook> inner,
      PyObject* dict)
      : owner_(std::move(owner)), param_(param.unsafeGetTensorImpl()), inner_(std::move(inner)), dict_(dict) {
    const std::lock_guard lock(owner_->mutex_);
    owner_->hooks_.insert(this);
  }
  GradientHook(const GradientHook&) = delete;
  GradientHook& operator=(const GradientHook&) = delete;
  ~GradientHook() override { owner_->forget(this); }

  void operator()(const at::Tensor& param) override {
    const auto owner = owner_;  // keeps the owner alive if close() removes this hook meanwhile
    struct Running {
      explicit Running(BackwardStep& owner) : owner(owner) { ++owner.running_; }
      ~Running() { --owner.running_; }
      BackwardStep& owner;
    } const running(*owner);
    // Users' hooks are entries of a Python dict. If it is empty, there is no need to wait for the GIL.
    if (inner_ != nullptr && (dict_ == nullptr || PyDict_GET_SIZE(dict_) != 0)) {
      (*inner_)(param);
    }
    if (!owner->closed_) {
      owner->arrive(*this, param);
    }
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs&) const override {
    TORCH_CHECK(
        owner_->closed_, owner_->constructor(),
        ": compiled autograd traces backward and cannot trace a step in it. Use one of the two.");
  }

  // This kind of hook on `param`, or null.
  static GradientHook* on(const AutogradMeta* meta) {
    PostAccumulateGradHook* const hook = meta == nullptr ? nullptr : meta->post_acc_grad_hooks_.get();
    return hook != nullptr && typeid(*hook) == typeid(GradientHook) ? static_cast<GradientHook*>(hook) : nullptr;
  }

 private:
  friend class BackwardStep;

  const std::shared_ptr<BackwardStep> owner_;
  TensorImpl* const param_;  // owns this hook
  std::unique_ptr<PostAccumulateGradHook> inner_;
  PyObject* const dict_;  // the users' hooks, owned by `inner_`; null if they are not Python's

  // Guarded by the owner's mutex_.
  uint64_t found_ = 0;    // the iteration in which the place below was found
  uint64_t fired_ = 0;    // the last iteration in which a gradient arrived,
  uint64_t applied_ = 0;  // and in which it was applied
  int32_t group_ = 0;
  Py_ssize_t position_ = 0;
  bool deferred_ = false;  // left to step()
  bool shared_ = false;    // others may write to its storage
  uint32_t version_ = 0;   // of the parameter, when its gradient had been applied
  uint32_t before_ = 0;    // likewise, before the update under way
};

BackwardStep::BackwardStep(
    py::object optimizer, std::shared_ptr<OptimizerSteps> steps, std::optional<int64_t> bucket_bytes,
    std::optional<double> clip_value)
    : optimizer_(std::move(optimizer)),
      steps_(std::move(steps)),
      fixed_bucket_(bucket_bytes),
      clip_value_(clip_value),
      used_(steps_->nothing_used()) {}

std::string BackwardStep::method(const std::string& name) const { return c10::str(steps_->name(), ".", name); }

std::string BackwardStep::constructor() const { return c10::str(steps_->name(), "(step_in_backward=True)"); }

BackwardStep::~BackwardStep() {
  // Any thread may destroy the last hook.
  if (Py_IsInitialized() != 0) {
    const py::gil_scoped_acquire gil;
    optimizer_ = py::object();
  } else {
    optimizer_.release();
  }
}

void BackwardStep::check_free(const GradientHook* hook, int32_t group, Py_ssize_t position) {
  TORCH_CHECK(
      hook == nullptr || hook->owner_->closed_, hook->owner_->constructor(), ": ", place(group, position),
      " is already stepped in backward by another optimizer, which is still alive (as one whose learning-rate "
      "scheduler is). Call its close() first.");
}

void BackwardStep::attach(const py::list& param_groups) {
  if (closed_) {
    return;
  }
  // Check all parameters before the first one is changed.
  std::vector<PyObject*> wanting;
  for_each_param(param_groups, [&](PyObject* object, int32_t group, Py_ssize_t position) {
    const auto& param = THPVariable_Unpack(object);
    const auto* const hook = GradientHook::on(meta_of(param));
    if (hook != nullptr && hook->owner_.get() == this) {
      return;
    }
    check_free(hook, group, position);
    const bool sharded = param.key_set().has(c10::DispatchKey::Python) ||
                         PyObject_HasAttrString(object, "_fsdp_flattened") != 0 ||
                         PyObject_HasAttrString(object, "_is_flat_param") != 0;
    TORCH_CHECK(
        !sharded, constructor(), ": ", place(group, position), " is a ", Py_TYPE(object)->tp_name,
        " whose gradient is not the one that backward accumulates (FSDP shards and reduces it first). Use "
        "step_in_backward=False.");
    if (at::isFloatingType(param.scalar_type()) || at::isComplexType(param.scalar_type())) {
      wanting.push_back(object);
    }
  });
  static PyObject* const name = PyUnicode_InternFromString("_post_accumulate_grad_hooks");
  static const auto* const ordered_dict = new py::object(py::module_::import("collections").attr("OrderedDict"));
  for (PyObject* const object : wanting) {
    const auto& param = THPVariable_Unpack(object);
    if (auto* const closed = GradientHook::on(meta_of(param)); closed != nullptr && closed->owner_.get() != this) {
      auto& slot = torch::autograd::impl::post_acc_grad_hooks(param);
      const auto old = std::move(slot);
      slot = std::move(static_cast<GradientHook&>(*old).inner_);
    } else if (closed != nullptr) {
      continue;  // it is listed twice
    }
    // Make the dict for users' hooks now: otherwise the first hook that is registered would replace this one.
    py::object dict = py::handle(object).attr(name);
    const auto* const meta = meta_of(param);
    if (dict.is_none() && (meta == nullptr || meta->post_acc_grad_hooks_ == nullptr)) {
      dict = (*ordered_dict)();
      py::handle(object).attr(name) = dict;
    }
    auto& slot = torch::autograd::impl::post_acc_grad_hooks(param);
    auto hook = std::make_unique<GradientHook>(
        shared_from_this(), param, std::move(slot), dict.is_none() ? nullptr : dict.ptr());
    slot = std::move(hook);
  }
}

void BackwardStep::close() {
  // Requires: the caller holds the GIL and a reference to this.
  closed_ = true;
  numbers_.clear();
  std::vector<std::unique_ptr<PostAccumulateGradHook>> taken;
  at::Tensor dropped;
  {
    const std::lock_guard lock(mutex_);
    dropped = take_placeholder();
    begin_iteration();
    if (running_ != 0) {
      return;  // backward is running: its hooks stay, and do nothing
    }
    // The hooks are destroyed after the mutex is released, because each removes itself from the list.
    taken.reserve(hooks_.size());
    for (auto* const hook : hooks_) {
      auto* const meta = static_cast<AutogradMeta*>(hook->param_->autograd_meta());
      if (meta != nullptr && meta->post_acc_grad_hooks_.get() == hook) {
        auto inner = std::move(hook->inner_);
        taken.push_back(std::exchange(meta->post_acc_grad_hooks_, std::move(inner)));
      }
    }
  }
}

void BackwardStep::forget(GradientHook* hook) {
  const std::lock_guard lock(mutex_);
  hooks_.erase(hook);
  applied_ -= hook->applied_ == iteration_ ? 1 : 0;
  const auto gone = [&](const Arrived& arrived) { return arrived.param == hook->param_; };
  pending_.erase(std::remove_if(pending_.begin(), pending_.end(), gone), pending_.end());
  pending_bytes_ = 0;
  for (const auto& arrived : pending_) {
    pending_bytes_ += arrived.bytes;
  }
  if (placeholder_ && gone(*placeholder_)) {
    placeholder_.reset();
  }
}

// Requires: mutex_ is held.
void BackwardStep::begin_iteration() {
  ++iteration_;
  begun_ = false;
  fired_ = false;
  may_discard_ = false;
  refusal_.clear();
  pending_.clear();
  pending_bytes_ = 0;
  task_ = -1;
  unfinished_ = 0;
  applied_ = 0;
  used_ = steps_->nothing_used();
  placeholder_.reset();
}

// Requires: neither the GIL nor mutex_ is held, because user code may run before they are acquired and after they
// are released.
void BackwardStep::find_all_places() {
  const py::gil_scoped_acquire gil;
  const py::object optimizer = optimizer_();
  if (optimizer.is_none()) {
    return;
  }
  const py::list param_groups = optimizer.attr("param_groups");
  const std::lock_guard lock(mutex_);
  if (!begun_) {
    find_places(param_groups);
  }
}

// Requires: the GIL and mutex_ are held. Finds the place of every parameter, once per iteration, before anything
// is applied.
void BackwardStep::find_places(const py::list& param_groups) {
  struct Extent {
    Memory memory;
    const c10::StorageImpl* storage;
    GradientHook* hook;
  };
  std::vector<Extent> extents;
  int64_t trainable_bytes = 0;
  bool all_on_cpu = true;
  for_each_param(param_groups, [&](PyObject* object, int32_t group, Py_ssize_t position) {
    const auto& param = THPVariable_Unpack(object);
    auto* const hook = GradientHook::on(meta_of(param));
    if (hook == nullptr || hook->owner_.get() != this) {
      return;
    }
    if (hook->found_ == iteration_) {
      hook->deferred_ = true;  // listed twice: step() updates both, one after the other
      return;
    }
    hook->found_ = iteration_;
    hook->group_ = group;
    hook->position_ = position;
    hook->deferred_ = false;
    hook->shared_ = false;
    if (!param.requires_grad() || param.layout() != c10::kStrided) {
      return;
    }
    trainable_bytes += bytes_of(param);
    all_on_cpu &= param.is_cpu();
    if (const Memory memory = memory_of(param.unsafeGetTensorImpl()); memory.begin != nullptr) {
      extents.push_back({memory, param.storage().unsafeGetStorageImpl(), hook});
    }
  });
  // Parameters that share memory are also updated one after the other, in the order of the lists.
  std::sort(extents.begin(), extents.end(), [](const Extent& a, const Extent& b) { return a.memory < b.memory; });
  size_t furthest = 0;
  for (size_t i = 1; i < extents.size(); ++i) {
    if (extents[i].storage == extents[i - 1].storage) {
      extents[i].hook->shared_ = true;
      extents[i - 1].hook->shared_ = true;
    }
    if (extents[i].memory.begin < extents[furthest].memory.end) {
      extents[i].hook->deferred_ = true;
      extents[furthest].hook->deferred_ = true;
    }
    if (extents[i].memory.end > extents[furthest].memory.end) {
      furthest = i;
    }
  }
  bucket_ = fixed_bucket_.value_or(
      std::min(trainable_bytes / kBucketsAtLeast, all_on_cpu ? kLargestBucketCpu : kLargestBucket));
  begun_ = true;
}

// Requires: mutex_ is held, within a backward that has not been noted yet. The callback runs only if backward
// succeeds.
void BackwardStep::note_backward() {
  ++unfinished_;
  torch::autograd::Engine::get_default_engine().queue_callback([step = weak_from_this(), iteration = iteration_] {
    if (const auto self = step.lock()) {
      const std::lock_guard lock(self->mutex_);
      if (self->iteration_ == iteration) {
        --self->unfinished_;
      }
    }
  });
}

// Requires: mutex_ is held. Whether the last backward ended with an error, ours or another one.
bool BackwardStep::has_failed() const {
  return unfinished_ != 0 && torch::autograd::get_current_graph_task_id() == -1;
}

void BackwardStep::arrive(GradientHook& hook, const at::Tensor& param) {
  AutogradMeta* const meta = meta_of(param);
  const at::Tensor& grad = meta->grad_;
  if (!grad.defined()) {
    return;  // a user's hook has removed it
  }
  std::unique_lock lock(mutex_);
  if (!begun_) {
    lock.unlock();
    find_all_places();
    lock.lock();
  }
  if (hook.found_ != iteration_) {
    return;  // not the optimizer's any more
  }
  TORCH_CHECK(refusal_.empty(), refusal_);
  const auto refuse = [&](const std::string& why) {
    may_discard_ = true;
    refusal_ = c10::str(constructor(), ": ", place(hook.group_, hook.position_), " ", why);
    TORCH_CHECK(false, refusal_);
  };
  static const std::string taken_over =
      " If another optimizer has taken this parameter over, call close() of the one that steps in backward, which "
      "is still alive.";
  if (hook.fired_ == iteration_) {
    refuse(
        "got a gradient for the second time since the last step(), and the first one may have been applied. One "
        "backward() makes one step: no gradient accumulation, no second backward over a retained graph, no "
        "reentrant checkpointing of a module that is used twice. Use step_in_backward=False for these." +
        taken_over);
  }
  // Backward passes are numbered as they begin, so a higher number is another pass, or a part of the running one.
  // Between two passes a forward pass may have read parameters, some of them updated and some not.
  const int task = torch::autograd::get_current_graph_task_id();
  if (fired_ && task > task_) {
    lock.unlock();
    const bool part = is_within_python_backward();
    lock.lock();
    if (!part) {
      refuse(
          "got a gradient from a second backward() since the last step(), and the first one's may have been "
          "applied. Add the losses up and call backward() once, or use step_in_backward=False." +
          taken_over);
    }
  }
  if (task > task_) {
    task_ = task;
    note_backward();
  }
  if (c10::GradMode::is_enabled()) {
    refuse(
        "got a gradient that is itself differentiable (create_graph=True); applying it would change what the "
        "second backward needs. Use step_in_backward=False for double backward.");
  }
  if (grad.layout() != c10::kStrided) {
    refuse(
        c10::str(
            "got a gradient of layout ", grad.layout(),
            "; steps in backward take dense ones. Use sparse=False, or step_in_backward=False."));
  }
  if (has_accumulator_hook(param)) {
    refuse(
        "has a hook on its AccumulateGrad, as DistributedDataParallel puts there to reduce gradients after they "
        "have been accumulated. A step in backward would apply them before. Use step_in_backward=False.");
  }
  hook.fired_ = iteration_;
  fired_ = true;
  if (hook.deferred_) {
    return;
  }
  Arrived arrived{
      param.unsafeGetTensorImpl(),
      weak(grad),
      version_of(grad),
      bytes_of(grad),
      hook.group_,
      hook.position_,
      std::nullopt};
  if (!grad.is_cpu()) {
    arrived.stream = c10::impl::VirtualGuardImpl(grad.device().type()).getStream(grad.device());
  }
  pending_bytes_ += arrived.bytes;
  pending_.push_back(std::move(arrived));
  if (pending_bytes_ <= bucket_) {
    return;
  }
  // The smallest gradient stays in the bucket if it fits, so that step() can notice that the user has changed
  // gradients, believing that all of them are there.
  std::vector<Arrived> due;
  due.swap(pending_);
  const auto smallest = std::min_element(
      due.begin(), due.end(), [](const Arrived& a, const Arrived& b) { return a.bytes < b.bytes; });
  pending_bytes_ = 0;
  if (smallest->bytes <= bucket_) {
    pending_.push_back(*smallest);
    pending_bytes_ = smallest->bytes;
    due.erase(smallest);
  }
  lock.unlock();
  apply(std::move(due));
}

void BackwardStep::apply(std::vector<Arrived> due) {
  const py::gil_scoped_acquire gil;
  const py::object optimizer = optimizer_();
  if (optimizer.is_none()) {
    return;
  }
  try {
    apply_in(optimizer, due);
  } catch (const std::exception& error) {
    const std::lock_guard lock(mutex_);
    if (refusal_.empty()) {
      may_discard_ = true;
      refusal_ = c10::str(constructor(), ": the step in backward failed: ", error.what());
    }
    throw;
  }
}

void BackwardStep::apply_in(const py::object& optimizer, std::vector<Arrived>& due) {
  const py::list param_groups = optimizer.attr("param_groups");
  const py::dict state = optimizer.attr("state");
  std::sort(due.begin(), due.end(), [](const Arrived& a, const Arrived& b) {
    return std::tie(a.group, a.position) < std::tie(b.group, b.position);
  });
  Selection selection;
  std::vector<AutogradMeta*> metas;  // of parameters that the selection holds
  std::vector<Arrived> selected;
  std::vector<std::pair<c10::Stream, c10::Stream>> streams;  // (where gradients came, where the update goes)
  for (const auto& arrived : due) {
    PyObject* const param = param_at(param_groups, arrived.group, arrived.position);
    const bool same = param != nullptr && THPVariable_Unpack(param).unsafeGetTensorImpl() == arrived.param;
    AutogradMeta* const meta = same ? meta_of(THPVariable_Unpack(param)) : nullptr;
    if (meta == nullptr || !arrived.is(meta->grad_)) {
      // The lists or the gradients were edited during backward: step() reports it.
      const std::lock_guard lock(mutex_);
      pending_.push_back(arrived);
      pending_bytes_ += arrived.bytes;
      continue;
    }
    if (selection.parts.empty() || selection.parts.back().group != arrived.group) {
      selection.parts.push_back({arrived.group, py::list(), {}});
    }
    selection.parts.back().params.append(py::handle(param));
    selection.parts.back().positions.push_back(arrived.position);
    metas.push_back(meta);
    selected.push_back(arrived);
    if (arrived.stream) {
      const c10::Device device = arrived.stream->device();
      const auto current = c10::impl::VirtualGuardImpl(device.type()).getStream(device);
      const std::pair both(*arrived.stream, current);
      if (current != *arrived.stream && std::find(streams.begin(), streams.end(), both) == streams.end()) {
        streams.push_back(both);
      }
    }
  }
  if (metas.empty()) {
    return;
  }
  const auto wait = [](const c10::Stream& waiting, const c10::Stream& awaited) {
    c10::Event event(awaited.device_type());
    event.record(awaited);
    event.block(waiting);
  };
  for (const auto& [came, goes] : streams) {
    wait(goes, came);
  }
  clip(metas);
  std::unique_ptr<UsedOptions> used;
  // Views of one tensor share a version counter, even if they no longer share memory. So what this update adds to
  // the versions of other parameters must not count as a write by the user.
  const auto for_each_applied = [&](auto&& visit) {
    for (auto* const hook : hooks_) {
      if (hook->applied_ == iteration_) {
        visit(*hook, version_of(hook->param_));
      }
    }
  };
  {
    const std::lock_guard lock(mutex_);
    used = used_->copy();
    for_each_applied([](GradientHook& hook, uint32_t version) { hook.before_ = version; });
  }
  py::object rest = steps_->step_part(param_groups, state, selection, *used, std::nullopt);
  if (!rest.is_none()) {
    optimizer.attr("_step_rest")(rest, py::none(), py::none());
    steps_->step_part(param_groups, state, selection, *used, py::cast<py::list>(rest));
  }
  {
    const std::lock_guard lock(mutex_);
    for_each_applied([](GradientHook& hook, uint32_t version) { hook.version_ += version - hook.before_; });
  }
  // The memory of a gradient returns to the stream it came from. That stream must not reuse it before the update
  // has read it, and the next forward pass waits for that stream only.
  for (const auto& [came, goes] : streams) {
    wait(came, goes);
  }
  // Gradients are freed and the placeholder is made without the mutex, because both can run user code.
  std::vector<at::Tensor> gone;
  gone.reserve(metas.size() + 1);
  const size_t none = metas.size();
  size_t stands = none;
  for (size_t i = 0; i < metas.size(); ++i) {
    gone.push_back(std::move(metas[i]->grad_));
    // A gradient whose parameter was frozen meanwhile has not been applied.
    stands = gone[i].defined() && metas[i]->requires_grad_ ? i : stands;
  }
  {
    const std::lock_guard lock(mutex_);
    stands = pending_.empty() ? stands : none;
  }
  // No gradient is left by which step() could notice a change, so one placeholder stands for them all. It is that
  // of the last parameter: a second backward reaches the first ones before it, and is refused there with a clear
  // message instead of torch's own error about writing to an expanded tensor.
  at::Tensor instead = stands != none ? make_placeholder(gone[stands]) : at::Tensor();
  const std::lock_guard lock(mutex_);
  used_->merge(*used);
  for (auto* const meta : metas) {
    if (auto* const hook = GradientHook::on(meta);
        hook != nullptr && hook->owner_.get() == this && meta->requires_grad_) {
      applied_ += hook->applied_ == iteration_ ? 0 : 1;
      hook->applied_ = iteration_;
      hook->version_ = version_of(hook->param_);
    }
  }
  if (instead.defined()) {
    gone.push_back(take_placeholder());
    auto& placeholder = placeholder_.emplace(selected[stands]);
    placeholder.grad = weak(instead);
    placeholder.version = version_of(instead);
    metas[stands]->grad_ = std::move(instead);
  }
}

// Requires: the GIL and mutex_ are held.
at::Tensor BackwardStep::take_placeholder() {
  at::Tensor taken;
  if (placeholder_) {
    // The parameter exists, otherwise forget() would have been called; but its destruction may have begun.
    auto* const meta = static_cast<AutogradMeta*>(placeholder_->param->autograd_meta());
    if (meta != nullptr && placeholder_->is(meta->grad_)) {
      taken = std::move(meta->grad_);
    }
  }
  placeholder_.reset();
  return taken;
}

// Requires: the GIL is held. A placeholder for a gradient that has been freed. It holds one NaN, so a norm of it
// cannot be taken for a real one.
at::Tensor BackwardStep::make_placeholder(const at::Tensor& gone) {
  // The number is kept, because on a GPU making it takes an allocation and a kernel. Torch refuses to write to one
  // number expanded to several elements; with one element it is written to, and its version shows that.
  const bool writable = gone.numel() == 1;
  for (const auto& [number, version] : numbers_) {
    if (!writable && number.device() == gone.device() && number.scalar_type() == gone.scalar_type() &&
        version_of(number) == version) {
      return at::Tensor(number).expand(gone.sizes());
    }
  }
  constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
  const auto number = at::full({}, kNaN, gone.options().requires_grad(false));
  // One made during a capture holds nothing until the graph is replayed; one made under a mode can be the mode's.
  if (!writable && !number.key_set().has(c10::DispatchKey::Python) && !is_capturing(number.device())) {
    const auto is_written = [](const auto& kept) { return version_of(kept.first) != kept.second; };
    numbers_.erase(std::remove_if(numbers_.begin(), numbers_.end(), is_written), numbers_.end());
    numbers_.emplace_back(number, version_of(number));
  }
  return number.expand(gone.sizes());
}

// Requires: the GIL and mutex_ are held. Checks that backward has applied what step() would apply.
void BackwardStep::check_applied(const py::list& param_groups) const {
  int64_t found = 0;
  for_each_param(param_groups, [&](PyObject* object, int32_t group, Py_ssize_t position) {
    const auto& param = THPVariable_Unpack(object);
    const auto* const meta = meta_of(param);
    const auto* const hook = GradientHook::on(meta);
    if (hook == nullptr || hook->owner_.get() != this || hook->applied_ != iteration_) {
      return;
    }
    ++found;
    TORCH_CHECK(
        param.requires_grad(), method("step"), ": ", place(group, position),
        " was frozen between backward and step(), and backward has applied its gradient. Freeze before backward "
        "or after step(); unfreeze it to make this step.");
    TORCH_CHECK(
        !meta->grad_.defined() || (placeholder_ && placeholder_->is(meta->grad_)), method("step"),
        ": the gradient of ", place(group, position),
        " was set between backward and step(), and backward has applied the one it made. Set gradients with "
        "step_in_backward=False, or before backward. zero_grad() gives this iteration up; what has been applied "
        "stays so.");
    TORCH_CHECK(
        hook->shared_ || version_of(param) == hook->version_, method("step"), ": ", place(group, position),
        " was written to between backward and step(), and backward has applied its gradient: before, where an "
        "ordinary step comes after. Write to parameters after step(), or use step_in_backward=False. "
        "zero_grad() gives this iteration up; what has been applied stays so.");
    TORCH_CHECK(
        hook->group_ == group, method("step"), ": ", place(group, position), " was in param_groups[", hook->group_,
        "] when backward applied its gradient. Change groups after step(); undo it to make this step.");
  });
  TORCH_CHECK(
      found == applied_, method("step"), ": backward has applied the gradients of ", applied_, " parameters, and ",
      found,
      " of these are in param_groups now. Edit the lists after step(); undo it to make this step. zero_grad() "
      "gives it up; what has been applied stays so.");
}

void BackwardStep::check_step(
    const py::list& param_groups, const py::object& grad_scale, const py::object& found_inf) {
  std::unique_ptr<UsedOptions> used;
  {
    const std::lock_guard lock(mutex_);
    may_discard_ = true;  // after any error below, zero_grad() gives the iteration up
    TORCH_CHECK(
        grad_scale.is_none() && found_inf.is_none(), constructor(),
        ": a GradScaler scales the gradients that backward applies, and asks too late whether they are finite. ",
        fired_ ? "The gradients of this backward have been applied as they came, scaled; restore the parameters. "
               : "",
        "Use bfloat16 without a scaler, or step_in_backward=False.");
    TORCH_CHECK(
        refusal_.empty(), method("step"),
        ": the last backward was refused, so there is no step to make. Call zero_grad() to go on; what had been "
        "applied stays so. The reason was: ",
        refusal_);
    const auto check = [&](const Arrived& arrived) {
      PyObject* const object = param_at(param_groups, arrived.group, arrived.position);
      if (object == nullptr || THPVariable_Unpack(object).unsafeGetTensorImpl() != arrived.param) {
        return;  // not the optimizer's any more
      }
      const auto& grad = meta_of(THPVariable_Unpack(object))->grad_;
      const bool taken = !grad.defined();
      TORCH_CHECK(
          !taken && arrived.is(grad) && version_of(grad) == arrived.version, method("step"), ": the gradient of ",
          place(arrived.group, arrived.position), " was ", taken ? "taken away" : "changed",
          " between backward and step(). With step_in_backward most gradients have been applied by then, so "
          "nothing can be done to all of them: no clip_grad_norm_ (Transformers' Trainer calls "
          "it unless max_grad_norm=0 is set and, since version 5, _get_grad_norm is overridden), no "
          "GradScaler.unscale_, no model.zero_grad(). Use clip_value= to clip by value, or "
          "step_in_backward=False. "
          "zero_grad() gives this iteration up; what has been applied stays so.");
    };
    std::for_each(pending_.begin(), pending_.end(), check);
    if (placeholder_) {
      check(*placeholder_);
    }
    check_applied(param_groups);
    used = used_->copy();
  }
  steps_->check_unchanged(param_groups, *used);
  std::vector<AutogradMeta*> left;
  for_each_param(param_groups, [&](PyObject* object, int32_t, Py_ssize_t) {
    const auto& param = THPVariable_Unpack(object);
    AutogradMeta* const meta = meta_of(param);
    if (meta == nullptr || !meta->grad_.defined()) {
      return;
    }
    if (placeholder_ && placeholder_->is(meta->grad_)) {
      meta->grad_.reset();
    } else if (meta->requires_grad_ && meta->grad_.layout() == c10::kStrided) {
      left.push_back(meta);
    }
  });
  clip(left);
  const std::lock_guard lock(mutex_);
  placeholder_.reset();
  for (auto& arrived : pending_) {
    PyObject* const object = param_at(param_groups, arrived.group, arrived.position);
    if (object != nullptr && THPVariable_Unpack(object).unsafeGetTensorImpl() == arrived.param) {
      const auto& grad = meta_of(THPVariable_Unpack(object))->grad_;
      arrived.grad = weak(grad);
      arrived.version = version_of(grad);
    }
  }
}

void BackwardStep::end_step(const py::list& param_groups) {
  std::vector<at::Tensor> dropped;
  for_each_param(param_groups, [&](PyObject* object, int32_t, Py_ssize_t) {
    const auto& param = THPVariable_Unpack(object);
    AutogradMeta* const meta = meta_of(param);
    if (meta != nullptr && meta->grad_.defined()) {
      dropped.push_back(std::move(meta->grad_));
    }
  });
  {
    const std::lock_guard lock(mutex_);
    begin_iteration();
  }
  attach(param_groups);
}

void BackwardStep::check_zero_grad(bool set_to_none) {
  TORCH_CHECK_VALUE(
      set_to_none, method("zero_grad"),
      ": set_to_none=False keeps the memory of all gradients, and step_in_backward lets "
      "go of it. Leave set_to_none at True.");
  const std::lock_guard lock(mutex_);
  TORCH_CHECK(
      !fired_ || may_discard_ || has_failed(), method("zero_grad"),
      ": gradients are to be discarded that backward has applied in part "
      "(step_in_backward=True). Call step() first: it makes the rest of the step.");
  begin_iteration();
}

void BackwardStep::check_between_steps(const std::string& function) {
  const std::lock_guard lock(mutex_);
  TORCH_CHECK(
      !fired_, method(function),
      ": backward has made a part of a step (step_in_backward=True), so the state is neither that before the "
      "step nor that after it. Call step() first",
      may_discard_ || has_failed() ? ", or zero_grad() to give the step up." : ".");
}

// Clamps the elements of the gradients; NaN stays NaN.
void BackwardStep::clip(const std::vector<AutogradMeta*>& metas) const {
  if (!clip_value_) {
    return;
  }
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> grads;
  for (auto* const meta : metas) {
    if (at::has_internal_overlap(meta->grad_) == at::MemOverlap::No) {
      grads.push_back(meta->grad_);
    } else {
      meta->grad_ = meta->grad_.clamp(-*clip_value_, *clip_value_);  // expanded: cannot be written to
    }
  }
  if (!grads.empty()) {
    at::_foreach_clamp_min_(grads, -*clip_value_);
    at::_foreach_clamp_max_(grads, *clip_value_);
  }
}

int64_t BackwardStep::bucket_bytes() {
  const std::lock_guard lock(mutex_);
  return fixed_bucket_.value_or(bucket_);
}

void BackwardStep::check_free(const py::list& param_groups, int32_t first) {
  for_each_param(param_groups, [&](PyObject* object, int32_t group, Py_ssize_t position) {
    const auto* const hook = GradientHook::on(meta_of(THPVariable_Unpack(object)));
    check_free(hook, first + group, position);
  });
}

bool has_accumulator_hook(const at::Tensor& param) {
  const auto accumulator = torch::autograd::impl::try_get_grad_accumulator(param);
  return accumulator != nullptr && !accumulator->post_hooks().empty();
}

void bind_backward_step(py::module_& module) {
  using namespace py::literals;
  py::class_<BackwardStep, std::shared_ptr<BackwardStep>>(
      module, "BackwardStep", "Makes the part of an optimizer's steps that can be made within backward.")
      .def(
          py::init<py::object, std::shared_ptr<OptimizerSteps>, std::optional<int64_t>, std::optional<double>>(),
          "optimizer"_a, "steps"_a, "bucket_bytes"_a, "clip_value"_a)
      .def("attach", &BackwardStep::attach, "param_groups"_a)
      .def("check_step", &BackwardStep::check_step, "param_groups"_a, "grad_scale"_a, "found_inf"_a)
      .def("end_step", &BackwardStep::end_step, "param_groups"_a)
      .def("check_zero_grad", &BackwardStep::check_zero_grad, "set_to_none"_a)
      .def("check_between_steps", &BackwardStep::check_between_steps, "function"_a)
      .def("close", &BackwardStep::close)
      .def_static(
          "check_free", py::overload_cast<const py::list&, int32_t>(&BackwardStep::check_free), "param_groups"_a,
          "first"_a)
      .def_property_readonly("bucket_bytes", &BackwardStep::bucket_bytes);
}

}  // namespace torch_freeze
