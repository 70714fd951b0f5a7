#include "core/param_walk.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/InferenceMode.h>
#include <dlfcn.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <array>
#include <string>
#include <tuple>

namespace torch_freeze {
namespace {

namespace py = pybind11;
using c10::TensorImpl;
using torch::autograd::AutogradMeta;

// Parameters looked at together. With caches cold a step is nothing but misses on the tensors' own objects, so
// each stage below touches the objects of a whole run before the next stage follows their pointers: the misses
// of a run overlap, where walking parameter by parameter would wait for every one in turn.
constexpr Py_ssize_t kRun = 64;
constexpr int kLine = 64;

inline void prefetch(const void* object, int bytes) {
  for (int offset = 0; offset < bytes; offset += kLine) {
    __builtin_prefetch(static_cast<const char*>(object) + offset, 1);
  }
}

// Reading the version counter brings its line in, ahead of the atomic increment that would have to wait for it.
inline void touch_version(const TensorImpl* tensor) {
  if (tensor->version_counter().enabled()) {
    asm volatile("" : : "r"(tensor->version_counter().current_version()));
  }
}

// A tensor's hash is its id, so the dict need not call back into Python for it. CPython exports the look-up for
// known hashes without promising it; without it the ordinary one serves.
using KnownHashLookup = PyObject* (*)(PyObject*, PyObject*, Py_hash_t);
const auto lookup_known_hash = reinterpret_cast<KnownHashLookup>(dlsym(RTLD_DEFAULT, "_PyDict_GetItem_KnownHash"));

// The member behind TensorImpl::autograd_meta(), whose call across libraries would be a third of what a frozen
// parameter costs. Explicit instantiation may name what is not public; a torch without the member does not
// compile.
using AutogradMetaMember = std::unique_ptr<c10::AutogradMetaInterface> TensorImpl::*;
AutogradMetaMember autograd_meta_member();
template <AutogradMetaMember kMember>
struct AutogradMetaAccess {
  friend AutogradMetaMember autograd_meta_member() { return kMember; }
};
template struct AutogradMetaAccess<&TensorImpl::autograd_meta_>;

inline AutogradMeta* autograd_meta_of(const TensorImpl* tensor) {
  return static_cast<AutogradMeta*>((tensor->*autograd_meta_member()).get());
}

// A parameter's state mostly holds one entry, the one wanted: reading it is cheaper than looking it up. Borrowed;
// null where it is missing.
inline PyObject* first_or_lookup(PyObject* dict, PyObject* key) {
  Py_ssize_t position = 0;
  PyObject* first = nullptr;
  PyObject* value = nullptr;
  if (PyDict_Next(dict, &position, &first, &value) != 0 && first == key) {
    return value;
  }
  value = PyDict_GetItemWithError(dict, key);
  if (value == nullptr && PyErr_Occurred() != nullptr) {
    throw py::error_already_set();
  }
  return value;
}

// In a parameter's state: its buffer is of the past, and starts from zero at the next step.
PyObject* stale_key() {
  static PyObject* const key = PyUnicode_InternFromString("momentum_stale");
  return key;
}

bool is_marked(PyObject* state) {
  PyObject* const mark = PyDict_GetItemWithError(state, stale_key());
  if (mark == nullptr && PyErr_Occurred() != nullptr) {
    throw py::error_already_set();
  }
  return mark == Py_True;
}

constexpr uint32_t kIndexMask = 0x7fffffff;

// Plain dense tensors: no sparse, quantised, nested, meta or wrapped ones, no pending negation or conjugation.
const uint64_t plain_keys = (c10::DispatchKeySet({c10::DispatchKey::CPU, c10::DispatchKey::CUDA}) |
                             c10::autograd_dispatch_keyset_with_ADInplaceOrView |
                             c10::getAutocastRelatedKeySetFromBackend(c10::BackendComponent::CPUBit) |
                             c10::getAutocastRelatedKeySetFromBackend(c10::BackendComponent::CUDABit))
                                .raw_repr();

inline bool is_plain(const TensorImpl* tensor) { return (tensor->key_set().raw_repr() & ~plain_keys) == 0; }

const uint64_t cuda_keys = c10::DispatchKeySet(c10::BackendComponent::CUDABit).raw_repr();
const uint64_t beyond_host_keys = ~plain_keys | cuda_keys;

// There is one CPU; which GPU has to be asked.
inline c10::Device device_of_plain(const TensorImpl* tensor) {
  return (tensor->key_set().raw_repr() & cuda_keys) == 0 ? c10::Device(c10::kCPU) : tensor->device();
}

// What is_inference() asks of one tensor.
const uint64_t tracked_keys = c10::DispatchKeySet(c10::DispatchKey::ADInplaceOrView).raw_repr();

C10_ALWAYS_INLINE bool same_sizes(const TensorImpl* a, const TensorImpl* b) {
  const auto left = a->sizes_default();
  const auto right = b->sizes_default();
  if (left.size() != right.size()) {
    return false;
  }
  for (size_t dim = 0; dim < left.size(); ++dim) {
    if (left[dim] != right[dim]) {
      return false;
    }
  }
  return true;
}

// The common case: nothing to convert, nothing to complain of. Both are plain, so none has sizes of its own
// making.
C10_ALWAYS_INLINE bool fits(const TensorImpl* param, const TensorImpl* tensor, caffe2::TypeMeta dtype) {
  return tensor->dtype() == dtype && tensor->is_contiguous_default(c10::MemoryFormat::Contiguous) &&
         same_sizes(param, tensor);
}

inline bool has_kernel(c10::DeviceType device) {
#ifdef WITH_CUDA
  return device == c10::kCPU || device == c10::kCUDA;
#else
  return device == c10::kCPU;
#endif
}

inline bool has_kernel(c10::ScalarType type) {
  return type == c10::kFloat || type == c10::kDouble || type == c10::kBFloat16 || type == c10::kHalf;
}

inline bool has_kernel(c10::DeviceType device, c10::ScalarType param, c10::ScalarType grad) {
  return has_kernel(param) && (grad == param || (device == c10::kCUDA && param == c10::kFloat &&
                                                 (grad == c10::kBFloat16 || grad == c10::kHalf)));
}

inline c10::ScalarType type_of(const TensorImpl* tensor) { return c10::typeMetaToScalarType(tensor->dtype()); }

// Of an element that a gradient repeats, stock on the CPU rounds the product with a scalar before it adds it, in
// some places and not in others.
inline bool is_rounded_otherwise(const TensorImpl* grad) {
  const auto type = type_of(grad);
  return (type == c10::kFloat || type == c10::kDouble) && device_of_plain(grad).is_cpu() &&
         at::has_internal_overlap(const_cast<TensorImpl*>(grad)) == at::MemOverlap::Yes;
}

inline bool has_own_buffer_type(const GroupUse& use) { return use.momentum_type != c10::ScalarType::Undefined; }

inline caffe2::TypeMeta buffer_type_of(const TensorImpl* param, const GroupUse& use) {
  return C10_LIKELY(!has_own_buffer_type(use)) ? param->dtype() : c10::scalarTypeToTypeMeta(use.momentum_type);
}

inline bool has_kernel_for_buffer(c10::ScalarType param, const GroupUse& use) {
  return C10_LIKELY(!has_own_buffer_type(use)) || param == c10::kFloat || param == c10::kBFloat16;
}

// A subclass that leaves operators alone is a tensor like any other.
bool overrides_operators(PyObject* tensor) {
  static const auto* plain = new py::object(py::module_::import("torch._C").attr("_disabled_torch_function_impl"));
  const auto type = py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(Py_TYPE(tensor)));
  return type.attr("__torch_function__").ptr() != plain->ptr();
}

// Where both are dense, their elements then lie in the same order. Strides of dimensions of size 1 say nothing.
bool same_layout(const TensorImpl* a, const TensorImpl* b) {
  if (a->is_contiguous() && b->is_contiguous()) {
    return true;
  }
  const auto sizes = a->sizes();
  for (size_t dim = 0; dim < sizes.size(); ++dim) {
    if (sizes[dim] != 1 && a->strides()[dim] != b->strides()[dim]) {
      return false;
    }
  }
  return true;
}

// Null where there are no elements. Memory can be given back under a tensor, as sharding does between uses, and
// would be written all the same: `has_memory` becomes false then. In a dense tensor the elements follow each
// other, so their number says where the last one is.
C10_ALWAYS_INLINE char* data_of(const TensorImpl* tensor, int64_t itemsize, bool& has_memory) {
  const int64_t numel = tensor->numel_default();
  if (numel == 0) {
    return nullptr;
  }
  auto* storage = tensor->unsafe_storage().unsafeGetStorageImpl();
  const int64_t offset = tensor->storage_offset_default();
  has_memory &= static_cast<size_t>((offset + numel) * itemsize) <= storage->nbytes();
  return static_cast<char*>(storage->mutable_data()) + offset * itemsize;
}

inline char* data_of(const TensorImpl* tensor) {
  bool any = true;
  return data_of(tensor, static_cast<int64_t>(tensor->itemsize()), any);
}

inline bool has_memory(const TensorImpl* tensor) {
  bool yes = true;
  data_of(tensor, static_cast<int64_t>(tensor->itemsize()), yes);
  return yes;
}

// Of dense tensors.
bool overlap(const TensorImpl* a, const TensorImpl* b) {
  const char* const begin_a = data_of(a);
  const char* const begin_b = data_of(b);
  return begin_a < begin_b + b->numel_default() * static_cast<int64_t>(b->dtype().itemsize()) &&
         begin_b < begin_a + a->numel_default() * static_cast<int64_t>(a->dtype().itemsize());
}

// Wrapped tensors and those without fixed sizes.
inline bool is_opaque(const TensorImpl* tensor) {
  constexpr c10::DispatchKeySet opaque(
      {c10::DispatchKey::Python, c10::DispatchKey::NestedTensor, c10::DispatchKey::FuncTorchBatched,
       c10::DispatchKey::FuncTorchGradWrapper, c10::DispatchKey::Functionalize});
  return tensor->key_set().has_any(opaque);
}

// From a tensor's first byte to behind its last; what its strides leave out counts too. Empty for what has no
// memory of its own.
struct Memory {
  const char* begin = nullptr;
  const char* end = nullptr;
  bool operator<(const Memory& other) const { return begin < other.begin; }
};

Memory memory_of(const TensorImpl* tensor) {
  if (is_opaque(tensor) || !tensor->has_storage() || tensor->numel() == 0) {
    return {};
  }
  int64_t last = 0;
  for (int64_t dim = 0; dim < tensor->dim(); ++dim) {
    last += (tensor->size(dim) - 1) * tensor->stride(dim);
  }
  const auto itemsize = static_cast<int64_t>(tensor->itemsize());
  const auto* const begin =
      static_cast<const char*>(tensor->unsafe_storage().data()) + tensor->storage_offset() * itemsize;
  return {begin, begin + (last + 1) * itemsize};
}

// Sorted and without overlaps.
void merge(std::vector<Memory>& parts) {
  std::sort(parts.begin(), parts.end());
  size_t kept = 0;
  for (const auto& part : parts) {
    if (kept > 0 && part.begin < parts[kept - 1].end) {
      parts[kept - 1].end = std::max(parts[kept - 1].end, part.end);
    } else {
      parts[kept++] = part;
    }
  }
  parts.resize(kept);
}

bool overlap(const std::vector<Memory>& merged, const Memory& memory) {
  const auto after = std::lower_bound(
      merged.begin(), merged.end(), memory.end,
      [](const Memory& part, const char* end) { return part.begin < end; });
  return after != merged.begin() && memory.begin < std::prev(after)->end;
}

inline void prefetch_storage(const TensorImpl* tensor) {
  prefetch(tensor->unsafe_storage().unsafeGetStorageImpl(), kLine);
}

// The host reads no elements of a GPU.
inline void prefetch_data(const TensorImpl* tensor) {
  if ((tensor->key_set().raw_repr() & beyond_host_keys) == 0) {
    prefetch(data_of(tensor), 1);
  }
}

// torch.distributed.tensor.DTensor; null while nobody has imported it, for then there is none.
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

at::Tensor local_of(py::handle dtensor) {
  static PyObject* const name = PyUnicode_InternFromString("_local_tensor");
  return THPVariable_Unpack(dtensor.attr(name).ptr());
}

// Whether each element of one lies where the same element of the other does.
bool same_placement(py::handle a, py::handle b) {
  return a.is(b) || (a.attr("placements").equal(b.attr("placements")) && a.attr("mesh").equal(b.attr("mesh")));
}

// Whether the local tensors are terms of a sum that is still to be taken.
bool is_partial(py::handle spec) {
  for (const auto placement : spec.attr("placements")) {
    if (py::cast<bool>(placement.attr("is_partial")())) {
      return true;
    }
  }
  return false;
}

std::string place(const GroupUse& use, Py_ssize_t index) {
  return c10::str("param_groups[", use.index, "]['params'][", index, "]");
}

}  // namespace

struct ParamWalk::Slot {
  PyObject* object;
  Py_ssize_t index;  // in the group's list
  bool exact;        // Tensor or Parameter, no subclass
  TensorImpl* param;
  AutogradMeta* meta;
  TensorImpl* grad;
  PyObject* state;          // null: none
  PyObject* buffer_object;  // null: none, or None
  TensorImpl* buffer;
};

void ParamWalk::reset(PyObject* state) {
  state_ = state;
  for (auto& batch : batches_) {
    batch.updates.clear();
    batch.tensors.clear();
    batch.launch.numel = 0;
  }
  frozen_.clear();
  fresh_.clear();
  copied_.clear();
  locals_.clear();
  wrappers_.clear();
  rest_.clear();
  skipped_.clear();
  shared_buffers_ = false;
  holding_ = false;
  held_tensors_.clear();
  held_storages_.clear();
  held_objects_.clear();
  state_position_ = 0;
  state_misses_ = 0;
  states_found_ = 0;
}

C10_ALWAYS_INLINE WalkBatch& ParamWalk::batch_for(
    c10::Device device, c10::ScalarType param_type, c10::ScalarType grad_type, const GroupUse& use) {
  const bool stochastic = has_own_buffer_type(use);
  // One batch is the rule, a few the exception.
  for (auto& batch : batches_) {
    if (batch.launch.device == device && batch.launch.param_type == param_type &&
        batch.launch.grad_type == grad_type && batch.launch.stochastic == stochastic) {
      return batch;
    }
  }
  auto& batch = batches_.emplace_back();
  batch.launch.device = device;
  batch.launch.param_type = param_type;
  batch.launch.grad_type = grad_type;
  batch.launch.momentum_type = stochastic ? use.momentum_type : param_type;
  batch.launch.stochastic = stochastic;
  return batch;
}

void ParamWalk::skip(const py::list& rest) {
  for (const auto entry : rest) {
    const auto group = py::cast<py::tuple>(entry);
    for (const auto param : py::cast<py::list>(group[1])) {
      skipped_.insert({py::cast<int32_t>(group[0]), param.ptr()});
    }
  }
}

// Borrowed; null where it is missing.
C10_ALWAYS_INLINE PyObject* ParamWalk::state_of(PyObject* param, bool exact) {
  // Parameters mostly have their state in their own order: the next entry is then the one wanted, and it is next
  // in memory too. Where the orders differ, the guess is soon given up.
  constexpr int kMisses = 4;
  if (state_misses_ < kMisses) {
    Py_ssize_t position = state_position_;
    PyObject* key = nullptr;
    PyObject* value = nullptr;
    if (PyDict_Next(state_, &position, &key, &value) != 0 && key == param) {
      state_position_ = position;
      state_misses_ = 0;
      return value;
    }
    ++state_misses_;
  }
  PyObject* const found =
      exact && lookup_known_hash != nullptr
          ? lookup_known_hash(state_, param, static_cast<Py_hash_t>(reinterpret_cast<intptr_t>(param)))
          : PyDict_GetItemWithError(state_, param);
  if (found == nullptr && PyErr_Occurred() != nullptr) {
    throw py::error_already_set();
  }
  return found;
}

void ParamWalk::leave(const Slot& slot, const GroupUse& use) {
  rest_.push_back({use.index, slot.index, py::reinterpret_borrow<py::object>(slot.object)});
}

void ParamWalk::leave_what_overlaps() {
  std::vector<Memory> left;
  for (const auto& [group, index, param] : rest_) {
    left.push_back(memory_of(THPVariable_Unpack(param.ptr()).unsafeGetTensorImpl()));
    PyObject* const entry = state_of(param.ptr(), THPVariable_CheckExact(param.ptr()));
    PyObject* const buffer =
        entry != nullptr && PyDict_Check(entry) ? first_or_lookup(entry, buffer_key_) : nullptr;
    if (buffer != nullptr && THPVariable_Check(buffer)) {
      left.push_back(memory_of(THPVariable_Unpack(buffer).unsafeGetTensorImpl()));
    }
  }
  std::vector<std::pair<const WalkBatch*, size_t>> others;
  for (const auto& batch : batches_) {
    for (size_t i = 0; i < batch.updates.size(); ++i) {
      others.emplace_back(&batch, i);
    }
  }
  // What joins the rest can share memory with others again.
  for (size_t before = 0; before != rest_.size();) {
    before = rest_.size();
    merge(left);
    std::vector<Memory> more;
    const auto joins = [&](const auto& other) {
      const auto& [batch, i] = other;
      const UpdateTensors& tensors = batch->tensors[i];
      const Memory param = memory_of(tensors.param);
      const Memory buffer = tensors.buffer == nullptr ? Memory{} : memory_of(tensors.buffer);
      if (!overlap(left, param) && !overlap(left, buffer)) {
        return false;
      }
      const TensorUpdate& update = batch->updates[i];
      TORCH_CHECK_VALUE(
          !batch->launch.stochastic, function_, ": param_groups[", update.group, "]['params'][", update.index,
          "] or its momentum_buffer shares memory with a tensor that no kernel covers; momentum_dtype is not for "
          "these. Clone one of them.");
      rest_.push_back({update.group, update.index, py::reinterpret_borrow<py::object>(tensors.object)});
      more.push_back(param);
      more.push_back(buffer);
      return true;
    };
    others.erase(std::remove_if(others.begin(), others.end(), joins), others.end());
    left.insert(left.end(), more.begin(), more.end());
  }
  std::stable_sort(rest_.begin(), rest_.end(), [](const Rest& a, const Rest& b) {
    return std::tie(a.group, a.index) < std::tie(b.group, b.index);
  });
}

py::object ParamWalk::rest() {
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

void ParamWalk::hold(TensorImpl* tensor) {
  if (tensor != nullptr) {
    held_tensors_.emplace_back(c10::intrusive_ptr<TensorImpl>::reclaim_copy(tensor));
  }
}

void ParamWalk::hold_from_here_on() {
  if (holding_) {
    return;
  }
  holding_ = true;
  for (const auto& batch : batches_) {
    for (const auto& tensors : batch.tensors) {
      hold(tensors.param);
      hold(tensors.grad);
      hold(tensors.buffer);
    }
  }
  for (auto* param : frozen_) {
    hold(param);
  }
  for (const auto& fresh : fresh_) {
    held_objects_.push_back(py::reinterpret_borrow<py::object>(fresh.param));
    held_objects_.push_back(py::reinterpret_borrow<py::object>(fresh.state));
  }
  // A tensor's memory can be exchanged while the tensor lives on.
  held_storages_ = hold_storages();
}

void ParamWalk::raise_no_memory(const Slot& slot, const TensorImpl* grad, const GroupUse& use) const {
  const char* what = !has_memory(slot.param) ? "" : !has_memory(grad) ? "the gradient of " : "momentum_buffer of ";
  TORCH_CHECK(
      false, function_, ": ", what, place(use, slot.index),
      " has more elements than its storage has memory for. Was the storage resized? Give the memory back before "
      "the step.");
}

C10_ALWAYS_INLINE void ParamWalk::push(
    const Slot& slot, TensorImpl* grad, const GroupUse& use, c10::ScalarType param_type,
    c10::ScalarType grad_type) {
  const auto itemsize = static_cast<int64_t>(c10::elementSize(param_type));
  const auto grad_itemsize =
      grad_type == param_type ? itemsize : static_cast<int64_t>(c10::elementSize(grad_type));
  const auto momentum_itemsize =
      C10_LIKELY(!has_own_buffer_type(use)) ? itemsize : static_cast<int64_t>(c10::elementSize(use.momentum_type));
  bool has_memory = true;
  char* const param_data = data_of(slot.param, itemsize, has_memory);
  char* const grad_data = data_of(grad, grad_itemsize, has_memory);
  char* momentum = nullptr;
  if (slot.buffer != nullptr) {
    momentum = data_of(slot.buffer, momentum_itemsize, has_memory);
    if ((slot.buffer->key_set().raw_repr() & cuda_keys) == 0) {
      prefetch(momentum, 1);
    }
    // A buffer that nothing else refers to cannot be another parameter's too.
    const auto& storage = slot.buffer->unsafe_storage();
    if (Py_REFCNT(slot.buffer_object) != 1 || Py_REFCNT(slot.state) != 1 || storage.use_count() != 1 ||
        !storage.unsafeGetStorageImpl()->resizable()) {
      shared_buffers_ = true;
      if (overlap(slot.buffer, slot.param) || overlap(slot.buffer, grad)) {
        // Its own parameter's memory: what is read and written first then matters, and stock's form says.
        leave(slot, use);
        return;
      }
    }
  }
  if (C10_UNLIKELY(!has_memory)) {
    raise_no_memory(slot, grad, use);
  }
  // Memory from elsewhere (a file's, another library's) can start anywhere; the kernels read whole elements.
  const auto misalignment = [](const char* data, int64_t size) {
    return reinterpret_cast<uintptr_t>(data) & static_cast<uintptr_t>(size - 1);
  };
  if (C10_UNLIKELY(
          (misalignment(param_data, itemsize) | misalignment(grad_data, grad_itemsize) |
           misalignment(momentum, momentum_itemsize)) != 0)) {
    leave(slot, use);
    return;
  }
  auto& batch = batch_for(device_of_plain(slot.param), param_type, grad_type, use);
  // A state of one entry holds the buffer alone, so it has no mark.
  const bool stale =
      use.has_buffer && slot.state != nullptr && PyDict_GET_SIZE(slot.state) > 1 && is_marked(slot.state);
  const bool fresh = use.has_buffer && (slot.buffer == nullptr || stale);
  if (fresh) {
    const auto batch_index = static_cast<size_t>(&batch - batches_.data());
    fresh_.push_back({slot.object, slot.state, batch_index, batch.updates.size(), at::Tensor()});
    fresh_.back().marked = stale;
    if (slot.buffer != nullptr) {
      fresh_.back().buffer = THPVariable_Unpack(slot.buffer_object);
      fresh_.back().enter = false;
    }
  }
  const int64_t numel = slot.param->numel();
  batch.updates.push_back(
      {param_data, grad_data, momentum, numel, use.index, static_cast<uint32_t>(slot.index) & kIndexMask, fresh});
  batch.tensors.push_back({slot.object, slot.param, grad, slot.buffer});
  if (C10_UNLIKELY(holding_)) {
    for (const auto* tensor : {slot.param, grad, slot.buffer}) {
      if (tensor != nullptr) {
        held_storages_.push_back(tensor->unsafe_storage());
      }
    }
  }
  batch.launch.numel += numel;
}

// The common case: plain, contiguous, of one type and on one device.
C10_ALWAYS_INLINE bool ParamWalk::is_usual(const Slot& slot, const GroupUse& use) {
  const auto* const param = slot.param;
  const auto* const grad = slot.grad;
  const auto* const buffer = slot.buffer;
  uint64_t any = param->key_set().raw_repr() | grad->key_set().raw_repr();
  uint64_t all = param->key_set().raw_repr() & grad->key_set().raw_repr();
  if (buffer != nullptr) {
    any |= buffer->key_set().raw_repr();
    all &= buffer->key_set().raw_repr();
  }
  return (any & ~plain_keys) == 0 && (all & tracked_keys) != 0 &&
         param->is_contiguous_default(c10::MemoryFormat::Contiguous) && fits(param, grad, param->dtype()) &&
         (buffer == nullptr || fits(param, buffer, buffer_type_of(param, use))) && has_kernel(type_of(param)) &&
         has_kernel_for_buffer(type_of(param), use) &&
         ((any & cuda_keys) == 0 || (has_kernel(c10::kCUDA) && grad->device() == param->device() &&
                                     (buffer == nullptr || buffer->device() == param->device())));
}

C10_ALWAYS_INLINE void ParamWalk::emit(const Slot& slot, const GroupUse& use) {
  if (C10_LIKELY(
          slot.exact && (slot.buffer == nullptr || THPVariable_CheckExact(slot.buffer_object)) &&
          is_usual(slot, use))) {
    push(slot, slot.grad, use, type_of(slot.param), type_of(slot.param));
  } else {
    emit_unusual(slot, use);
  }
}

// A step is by element, so each process steps what it holds of a DTensor; the buffer in the state is a DTensor
// too.
bool ParamWalk::emit_local(const Slot& slot, const GroupUse& use) {
  if (slot.exact || Py_TYPE(slot.object) != dtensor_type()) {
    return false;
  }
  const auto grad = py::reinterpret_steal<py::object>(THPVariable_Wrap(slot.meta->grad_));
  const auto spec = py::handle(slot.object).attr("_spec");
  if (is_partial(spec)) {
    return false;
  }
  std::array<at::Tensor, 3> locals;
  const std::array<PyObject*, 3> wholes = {slot.object, grad.ptr(), slot.buffer_object};
  for (size_t i = 0; i < wholes.size(); ++i) {
    if (wholes[i] == nullptr) {
      continue;
    }
    if (Py_TYPE(wholes[i]) != dtensor_type() || !same_placement(spec, py::handle(wholes[i]).attr("_spec"))) {
      return false;
    }
    locals[i] = local_of(wholes[i]);
  }
  Slot local = slot;
  local.param = locals[0].unsafeGetTensorImpl();
  local.grad = locals[1].unsafeGetTensorImpl();
  local.buffer = locals[2].defined() ? locals[2].unsafeGetTensorImpl() : nullptr;
  if (!is_usual(local, use)) {
    return false;
  }
  push(local, local.grad, use, type_of(local.param), type_of(local.param));
  for (auto& tensor : locals) {
    if (tensor.defined()) {
      locals_.push_back(std::move(tensor));
    }
  }
  wrappers_.push_back(slot.param);
  if (slot.buffer != nullptr) {
    wrappers_.push_back(slot.buffer);
  }
  return true;
}

void ParamWalk::add_group(PyObject* params, const GroupUse& use) {
  if (!PyList_Check(params) && !PyTuple_Check(params)) {
    throw py::type_error(
        c10::str(
            function_, ": param_groups[", use.index, "]['params'] is a ", Py_TYPE(params)->tp_name,
            "; give it a list of tensors"));
  }
  PyObject** items = PySequence_Fast_ITEMS(params);
  const Py_ssize_t size = PySequence_Fast_GET_SIZE(params);
  auto* const tensor_type = reinterpret_cast<PyTypeObject*>(THPVariableClass);
  auto* const parameter_type = reinterpret_cast<PyTypeObject*>(ParameterClass);
  std::array<TensorImpl*, kRun> tensors;
  std::array<AutogradMeta*, kRun> metas;
  std::array<Slot, kRun> slots;

  for (Py_ssize_t i = 0; i < std::min(kRun, size); ++i) {
    prefetch(items[i], 1);
  }
  for (Py_ssize_t start = 0; start < size; start += kRun) {
    const Py_ssize_t count = std::min(kRun, size - start);
    PyObject** run = items + start;
    for (Py_ssize_t i = 0; i < count; ++i) {
      PyTypeObject* const type = Py_TYPE(run[i]);
      if (type != parameter_type && type != tensor_type) {
        if (!THPVariable_Check(run[i])) {
          throw py::type_error(
              c10::str(
                  function_, ": ", place(use, start + i), " is a ", type->tp_name,
                  "; an optimizer takes tensors"));
        }
        // Subclasses are hashed and asked for attributes: their own code, or a garbage collection, may run.
        hold_from_here_on();
        if (PyList_Check(params)) {
          params = held_objects_.emplace_back(py::tuple(py::reinterpret_borrow<py::list>(params))).ptr();
          items = PySequence_Fast_ITEMS(params);
          run = items + start;
        }
      }
      tensors[i] = THPVariable_Unpack(run[i]).unsafeGetTensorImpl();
      prefetch(tensors[i], 1);
    }
    for (Py_ssize_t i = start + kRun; i < std::min(start + 2 * kRun, size); ++i) {
      prefetch(items[i], 1);  // the next run's
    }
    for (Py_ssize_t i = 0; i < count; ++i) {
      metas[i] = autograd_meta_of(tensors[i]);
      prefetch(metas[i] != nullptr ? &metas[i]->grad_ : nullptr, 1);
    }
    // From here on only what has a gradient. Without one, nothing but the three lines above is ever read.
    Py_ssize_t live = 0;
    for (Py_ssize_t i = 0; i < count; ++i) {
      AutogradMeta* const meta = metas[i];
      if (meta == nullptr || !meta->grad_.defined()) {
        continue;
      }
      TensorImpl* const grad = meta->grad_.unsafeGetTensorImpl();
      prefetch(grad, sizeof(TensorImpl));
      prefetch(reinterpret_cast<const char*>(tensors[i]) + kLine, sizeof(TensorImpl) - kLine);
      prefetch(&meta->requires_grad_, 1);
      PyTypeObject* const type = Py_TYPE(run[i]);
      const bool exact = type == parameter_type || type == tensor_type;
      slots[live++] = {run[i],  use.positions == nullptr ? start + i : use.positions[start + i],
                       exact,   tensors[i],
                       meta,    grad,
                       nullptr, nullptr,
                       nullptr};
      if (C10_UNLIKELY(holding_)) {
        hold(tensors[i]);
        hold(grad);
      }
    }
    const Py_ssize_t with_grad = live;
    live = 0;
    for (Py_ssize_t i = 0; i < with_grad; ++i) {
      const auto* const meta = slots[i].meta;
      if (!meta->requires_grad_ && meta->grad_fn_ == nullptr) {
        frozen_.push_back(slots[i].param);
      } else if (live++ != i) {
        slots[live - 1] = slots[i];
      }
    }
    if (use.has_buffer && !use.stock_form) {
      for (Py_ssize_t i = 0; i < live; ++i) {
        auto& slot = slots[i];
        slot.state = state_of(slot.object, slot.exact);
        if (slot.state != nullptr) {
          ++states_found_;
          if (C10_UNLIKELY(holding_)) {
            held_objects_.push_back(py::reinterpret_borrow<py::object>(slot.state));
          }
          prefetch(slot.state, sizeof(PyDictObject));
        }
      }
    }
    for (Py_ssize_t i = 0; i < live; ++i) {
      auto& slot = slots[i];
      if (slot.state != nullptr) {
        if (!PyDict_Check(slot.state)) {
          throw py::type_error(
              c10::str(
                  function_, ": the state of ", place(use, slot.index), " is a ", Py_TYPE(slot.state)->tp_name,
                  "; it has to be a dict"));
        }
        prefetch(reinterpret_cast<PyDictObject*>(slot.state)->ma_keys, 2 * kLine);
      }
      prefetch_storage(slot.param);
      prefetch_storage(slot.grad);
      touch_version(slot.param);
    }
    for (Py_ssize_t i = 0; i < live; ++i) {
      auto& slot = slots[i];
      if (slot.state != nullptr) {
        PyObject* const buffer = first_or_lookup(slot.state, buffer_key_);
        if (buffer != nullptr && buffer != Py_None) {
          if (C10_UNLIKELY(holding_)) {
            held_objects_.push_back(py::reinterpret_borrow<py::object>(buffer));
          }
          slot.buffer_object = buffer;
          prefetch(buffer, 1);
        }
      }
    }
    for (Py_ssize_t i = 0; i < live; ++i) {
      auto& slot = slots[i];
      if (slot.buffer_object != nullptr) {
        if (!THPVariable_Check(slot.buffer_object)) {
          throw py::type_error(
              c10::str(
                  function_, ": ", py::cast<std::string>(buffer_key_), " of ", place(use, slot.index), " is a ",
                  Py_TYPE(slot.buffer_object)->tp_name, "; it has to be a tensor or None"));
        }
        slot.buffer = THPVariable_Unpack(slot.buffer_object).unsafeGetTensorImpl();
        prefetch(slot.buffer, sizeof(TensorImpl));
      }
      prefetch_data(slot.param);
      prefetch_data(slot.grad);
    }
    for (Py_ssize_t i = 0; i < live; ++i) {
      if (slots[i].buffer != nullptr) {
        prefetch_storage(slots[i].buffer);
        touch_version(slots[i].buffer);
      }
    }
    for (Py_ssize_t i = 0; i < live; ++i) {
      if (C10_UNLIKELY(!skipped_.empty()) && skipped_.count({use.index, slots[i].object}) != 0) {
        continue;
      }
      if (use.stock_form) {
        leave(slots[i], use);
      } else {
        emit(slots[i], use);
      }
    }
  }
}

void ParamWalk::check_fit(
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

void ParamWalk::emit_unusual(const Slot& slot, const GroupUse& use) {
  if (emit_local(slot, use)) {
    return;
  }
  TensorImpl* const param = slot.param;
  TensorImpl* const grad = slot.grad;
  TensorImpl* const buffer = slot.buffer;
  // Bad input is found here, before anything is written, whatever takes the tensor later. Only opaque ones are
  // left to say for themselves what fits them.
  if (!is_opaque(param)) {
    if (!is_opaque(grad)) {
      check_fit("the gradient", grad, "Set .grad to None and run backward again.", slot, use);
    }
    if (buffer != nullptr && !is_opaque(buffer)) {
      check_fit(
          "momentum_buffer", buffer, "Delete it from the optimizer's state, or give it the parameter's.", slot,
          use);
    }
    if (buffer != nullptr && !is_opaque(grad)) {
      const bool nested = buffer->key_set().has(c10::DispatchKey::NestedTensor);
      TORCH_CHECK_TYPE(
          !nested && (is_opaque(buffer) || grad->layout() != c10::kStrided || buffer->layout() == c10::kStrided),
          function_, ": momentum_buffer of ", place(use, slot.index), " is ", nested ? "nested" : "not dense",
          "; the gradient is dense. Delete it from the optimizer's state.");
    }
    for (const auto* written : {static_cast<const TensorImpl*>(param), static_cast<const TensorImpl*>(buffer)}) {
      if (written != nullptr && written->layout() == c10::kStrided && !is_opaque(written)) {
        TORCH_CHECK(
            at::has_internal_overlap(const_cast<TensorImpl*>(written)) != at::MemOverlap::Yes, function_, ": ",
            written == param ? "" : "momentum_buffer of ", place(use, slot.index),
            " is expanded: several of its elements are one place in memory. Clone it before optimizing it.");
      }
    }
  }
  for (auto* written : {param, buffer}) {
    TORCH_CHECK(
        written == nullptr || c10::InferenceMode::is_enabled() || !written->is_inference(), function_, ": ",
        written == param ? "" : "momentum_buffer of ", place(use, slot.index),
        " was made in inference mode. Inplace update to inference tensor outside InferenceMode is not allowed; "
        "clone it first.");
  }
  if (has_own_buffer_type(use) && use.has_buffer) {
    emit_with_own_buffer(slot, use);
    return;
  }
  if (!is_plain(param) || !is_plain(grad) || (buffer != nullptr && !is_plain(buffer)) ||
      (!slot.exact && overrides_operators(slot.object)) || param->is_inference() ||
      (buffer != nullptr && (buffer->is_inference() || !THPVariable_CheckExact(slot.buffer_object)))) {
    leave(slot, use);
    return;
  }
  const auto type = type_of(param);
  if (!has_kernel(param->device().type()) || !has_kernel(param->device().type(), type, type_of(grad)) ||
      !param->is_non_overlapping_and_dense() ||
      (buffer != nullptr && (type_of(buffer) != type || !same_layout(param, buffer))) ||
      // Stock starts the buffer in the gradient's layout, so such a buffer is stock's to make.
      (use.has_buffer && buffer == nullptr && !same_layout(param, grad)) || is_rounded_otherwise(grad)) {
    leave(slot, use);
    return;
  }
  if (same_layout(param, grad)) {
    push(slot, grad, use, type, type_of(grad));
    return;
  }
  at::NoGradGuard no_grad;
  const auto& original = slot.meta->grad_;
  auto copy = at::empty_strided(param->sizes(), param->strides(), original.options().requires_grad(false));
  copy.copy_(original);
  push(slot, copy.unsafeGetTensorImpl(), use, type, type_of(grad));
  copied_.push_back({slot.meta, std::move(copy)});
}

// Stock has no form with such a buffer: what the kernels cannot take is refused.
void ParamWalk::emit_with_own_buffer(const Slot& slot, const GroupUse& use) {
  TensorImpl* const param = slot.param;
  const auto type = type_of(param);
  TORCH_CHECK_TYPE(
      is_plain(param) && is_plain(slot.grad) && (slot.exact || !overrides_operators(slot.object)) &&
          !param->is_inference() && has_kernel(param->device().type()) && has_kernel_for_buffer(type, use) &&
          param->is_non_overlapping_and_dense(),
      function_, ": ", place(use, slot.index), " is a ", type, " tensor (", Py_TYPE(slot.object)->tp_name, ") on ",
      param->device(), "; momentum_dtype=", use.momentum_type,
      " is for dense float32 and bfloat16 parameters on the CPU or CUDA. Put it in a group of "
      "momentum_dtype=None.");
  at::NoGradGuard no_grad;
  Slot fitting = slot;
  at::Tensor buffer;
  if (slot.buffer != nullptr && (type_of(slot.buffer) != use.momentum_type || !same_layout(param, slot.buffer) ||
                                 !is_plain(slot.buffer) || slot.buffer->is_inference())) {
    const auto& original = THPVariable_Unpack(slot.buffer_object);
    buffer = at::empty_strided(
        param->sizes(), param->strides(), at::TensorOptions().dtype(use.momentum_type).device(param->device()));
    buffer.copy_(original);
    held_objects_.push_back(py::reinterpret_steal<py::object>(THPVariable_Wrap(buffer)));
    fitting.buffer_object = held_objects_.back().ptr();
    fitting.buffer = buffer.unsafeGetTensorImpl();
  }
  const auto& grad = slot.meta->grad_;
  at::Tensor copy;
  if (type_of(slot.grad) != type || !same_layout(param, slot.grad)) {
    copy = at::empty_strided(param->sizes(), param->strides(), grad.options().dtype(type).requires_grad(false));
    copy.copy_(grad);
  }
  const size_t had_fresh = fresh_.size();
  const size_t had_rest = rest_.size();
  push(fitting, copy.defined() ? copy.unsafeGetTensorImpl() : slot.grad, use, type, type);
  TORCH_CHECK_VALUE(
      rest_.size() == had_rest, function_, ": ", place(use, slot.index),
      ", its gradient or its momentum_buffer lies in memory that is not aligned to its elements, or the buffer "
      "shares memory with the others; momentum_dtype is not for these. Clone them.");
  if (buffer.defined()) {
    if (fresh_.size() == had_fresh) {
      const auto& batch = batch_for(device_of_plain(param), type, type, use);
      const auto batch_index = static_cast<size_t>(&batch - batches_.data());
      fresh_.push_back({slot.object, slot.state, batch_index, batch.updates.size() - 1, std::move(buffer)});
    }
    fresh_.back().enter = true;
  }
  if (copy.defined()) {
    copied_.push_back({slot.meta, std::move(copy)});
  }
}

bool ParamWalk::has_overlap() const {
  // Two parameters share memory only if they share a storage, or if memory from elsewhere (NumPy, another process)
  // was wrapped more than once. So a set of storages settles the common case, and only otherwise are the
  // intervals themselves compared.
  thread_local std::vector<const c10::StorageImpl*> seen;
  size_t count = 0;
  for (const auto& batch : batches_) {
    count += batch.updates.size();
  }
  size_t capacity = 16;
  while (capacity < 2 * count) {
    capacity *= 2;
  }
  seen.assign(capacity, nullptr);
  bool suspicious = shared_buffers_;
  for (const auto& batch : batches_) {
    for (const auto& tensors : batch.tensors) {
      const auto* storage = tensors.param->unsafe_storage().unsafeGetStorageImpl();
      suspicious |= !storage->resizable();
      const auto mixed = reinterpret_cast<uintptr_t>(storage) * uint64_t{0x9e3779b97f4a7c15};
      size_t place = (mixed >> 32) & (capacity - 1);
      while (seen[place] != nullptr && seen[place] != storage) {
        place = (place + 1) & (capacity - 1);
      }
      suspicious |= seen[place] == storage;
      seen[place] = storage;
    }
  }
  if (!suspicious) {
    return false;
  }
  std::vector<Memory> written;
  written.reserve(2 * count);
  for (const auto& batch : batches_) {
    const auto note = [&](const void* data, int64_t numel, c10::ScalarType type) {
      if (data != nullptr) {
        const auto* const begin = static_cast<const char*>(data);
        written.push_back({begin, begin + numel * static_cast<int64_t>(c10::elementSize(type))});
      }
    };
    for (const auto& update : batch.updates) {
      note(update.param, update.numel, batch.launch.param_type);
      note(update.momentum, update.numel, batch.launch.momentum_type);
    }
  }
  const size_t before = written.size();
  merge(written);
  return written.size() < before;
}

void ParamWalk::make_fresh_buffers(bool overlap) {
  if (fresh_.empty()) {
    return;
  }
  // Python objects are made and hashed below.
  hold_from_here_on();
  at::NoGradGuard no_grad;
  for (size_t i = 0; i < fresh_.size(); ++i) {
    auto& fresh = fresh_[i];
    auto& update = batches_[fresh.batch].updates[fresh.update];
    // A parameter in two groups: the second finds the buffer that the first has made.
    for (size_t j = overlap ? i : 0; j-- > 0;) {
      const auto& earlier = fresh_[j];
      if (earlier.param == fresh.param && batches_[earlier.batch].updates[earlier.update].group != update.group) {
        fresh.buffer = earlier.buffer;
        update.fresh = false;
        break;
      }
    }
    if (!fresh.buffer.defined()) {
      const auto& launch = batches_[fresh.batch].launch;
      const auto options =
          launch.stochastic ? at::TensorOptions().dtype(launch.momentum_type) : at::TensorOptions();
      fresh.buffer = at::empty_like(THPVariable_Unpack(fresh.param), options);
    }
    TensorImpl* own = fresh.buffer.unsafeGetTensorImpl();
    if (!is_plain(own)) {
      const auto dtensor = py::reinterpret_steal<py::object>(THPVariable_Wrap(fresh.buffer));
      own = locals_.emplace_back(local_of(dtensor)).unsafeGetTensorImpl();
    }
    update.momentum = data_of(own);
  }
  // Entering them can fail half-way only for want of memory; then what was entered is taken out again.
  size_t entered = 0;
  try {
    for (; entered < fresh_.size(); ++entered) {
      auto& fresh = fresh_[entered];
      if (!fresh.enter) {
        continue;
      }
      if (fresh.state != nullptr) {
        fresh.replaced = py::reinterpret_borrow<py::object>(PyDict_GetItem(fresh.state, buffer_key_));
      }
      const auto buffer = py::reinterpret_steal<py::object>(THPVariable_Wrap(fresh.buffer));
      // Not py::dict(), which has no word for a want of memory.
      const auto entry = fresh.state != nullptr ? py::reinterpret_borrow<py::object>(fresh.state)
                                                : py::reinterpret_steal<py::object>(PyDict_New());
      if (!buffer || !entry || PyDict_SetItem(entry.ptr(), buffer_key_, buffer.ptr()) != 0 ||
          (fresh.state == nullptr && PyDict_SetItem(state_, fresh.param, entry.ptr()) != 0)) {
        throw py::error_already_set();
      }
    }
  } catch (...) {
    py::error_scope keep;
    for (size_t i = std::min(entered + 1, fresh_.size()); i-- > 0;) {
      if (!fresh_[i].enter) {
        continue;
      }
      PyObject* const inner = fresh_[i].state;
      PyObject* const replaced = fresh_[i].replaced.ptr();
      const int failed = replaced != nullptr ? PyDict_SetItem(inner, buffer_key_, replaced)
                         : inner != nullptr  ? PyDict_DelItem(inner, buffer_key_)
                                             : PyDict_DelItem(state_, fresh_[i].param);
      if (failed != 0) {
        PyErr_Clear();
      }
    }
    throw;
  }
}

void ParamWalk::unmark_fresh() {
  for (const auto& fresh : fresh_) {
    if (fresh.marked && PyDict_DelItem(fresh.state, stale_key()) != 0) {
      PyErr_Clear();  // a parameter that is listed twice: gone already
    }
  }
}

bool ParamWalk::has_idle_state() const { return PyDict_Size(state_) != states_found_; }

// Calls `visit(parameter, its entry in the state)` for the frozen ones that have any.
template <class Visit>
void ParamWalk::for_each_frozen(PyObject* params, Visit&& visit) {
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(params); ++i) {
    PyObject* const param = PySequence_Fast_GET_ITEM(params, i);
    if (!THPVariable_Check(param)) {
      continue;
    }
    const auto* const meta = autograd_meta_of(THPVariable_Unpack(param).unsafeGetTensorImpl());
    if (meta == nullptr || (!meta->requires_grad_ && meta->grad_fn_ == nullptr)) {
      const PyTypeObject* const type = Py_TYPE(param);
      const bool exact = type == reinterpret_cast<PyTypeObject*>(ParameterClass) ||
                         type == reinterpret_cast<PyTypeObject*>(THPVariableClass);
      PyObject* const entry = state_of(param, exact);
      if (entry != nullptr && PyDict_Check(entry)) {
        visit(param, entry);
      }
    }
  }
}

void ParamWalk::mark_frozen(PyObject* params) {
  for_each_frozen(params, [&](PyObject*, PyObject* entry) {
    PyObject* const buffer = PyDict_GetItemWithError(entry, buffer_key_);
    if (buffer != nullptr && buffer != Py_None && !is_marked(entry) &&
        PyDict_SetItem(entry, stale_key(), Py_True) != 0) {
      throw py::error_already_set();
    }
  });
}

void ParamWalk::drop_frozen(PyObject* params) {
  // Letting go of a buffer can run a user's code, so all are taken out of the state first.
  std::vector<py::object> dropped;
  std::vector<py::object> emptied;
  for_each_frozen(params, [&](PyObject* param, PyObject* entry) {
    for (PyObject* const key : {buffer_key_, stale_key()}) {
      if (PyObject* const value = PyDict_GetItemWithError(entry, key); value != nullptr) {
        dropped.push_back(py::reinterpret_borrow<py::object>(value));
        if (PyDict_DelItem(entry, key) != 0) {
          throw py::error_already_set();
        }
      }
    }
    if (PyDict_GET_SIZE(entry) == 0) {
      emptied.push_back(py::reinterpret_borrow<py::object>(param));
    }
  });
  for (const auto& param : emptied) {
    if (PyDict_DelItem(state_, param.ptr()) != 0) {
      if (PyErr_ExceptionMatches(PyExc_KeyError) == 0) {
        throw py::error_already_set();
      }
      PyErr_Clear();  // a parameter that is listed twice: gone already
    }
  }
}

void ParamWalk::return_copied_grads() {
  at::NoGradGuard no_grad;
  for (auto& grad : copied_) {
    if (at::has_internal_overlap(grad.meta->grad_) == at::MemOverlap::Yes) {
      grad.meta->grad_ = std::move(grad.copy);  // an expanded gradient cannot be written to
    } else {
      grad.meta->grad_.copy_(grad.copy);
    }
  }
}

std::vector<c10::Storage> ParamWalk::hold_storages() const {
  std::vector<c10::Storage> held;
  for (const auto& batch : batches_) {
    held.reserve(held.size() + 3 * batch.tensors.size());
    for (const auto& tensors : batch.tensors) {
      for (const auto* tensor : {tensors.param, tensors.grad, tensors.buffer}) {
        if (tensor != nullptr) {
          held.push_back(tensor->unsafe_storage());
        }
      }
    }
  }
  for (const auto& fresh : fresh_) {
    if (fresh.buffer.defined()) {
      held.push_back(fresh.buffer.storage());
    }
  }
  for (const auto& local : locals_) {
    held.push_back(local.storage());
  }
  return held;
}

void ParamWalk::bump_versions() {
  for (const auto& batch : batches_) {
    for (const auto& tensors : batch.tensors) {
      tensors.param->bump_version();
      if (tensors.buffer != nullptr) {
        tensors.buffer->bump_version();
      }
    }
  }
  for (auto* wrapper : wrappers_) {
    wrapper->bump_version();
  }
}

void ParamWalk::drop_frozen_grads() {
  // Letting go of a gradient can run a user's code, so all are detached before the first is let go.
  std::vector<at::Tensor> dropped;
  dropped.reserve(frozen_.size());
  for (auto* param : frozen_) {
    dropped.push_back(std::move(static_cast<AutogradMeta*>(param->autograd_meta())->grad_));
  }
  frozen_.clear();
}

}  // namespace torch_freeze
