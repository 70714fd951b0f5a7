#include "core/param_walk.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <array>

#include "core/dtypes.h"
#include "core/overlap.h"
#include "core/tensor_facts.h"

namespace torch_freeze {
namespace {

namespace py = pybind11;
using c10::TensorImpl;
using torch::autograd::AutogradMeta;

// How many parameters are walked together. With cold caches, the time of a step is cache misses on the tensors'
// own objects. Each stage below touches the objects of a whole run before the next stage follows their pointers,
// so the misses of a run overlap; walking parameter by parameter would wait for each of them in turn.
constexpr Py_ssize_t kRun = 64;
constexpr int kLine = 64;

inline void prefetch(const void* object, int bytes) {
  for (int offset = 0; offset < bytes; offset += kLine) {
    __builtin_prefetch(static_cast<const char*>(object) + offset, 1);
  }
}

// Reads the version counter, so that its cache line is there when it is incremented.
inline void touch_version(const TensorImpl* tensor) {
  if (tensor->version_counter().enabled()) {
    asm volatile("" : : "r"(tensor->version_counter().current_version()));
  }
}

constexpr uint32_t kIndexMask = 0x7fffffff;

inline caffe2::TypeMeta buffer_type_of(const TensorImpl* param, const GroupUse& use) {
  return C10_LIKELY(!has_own_buffer_type(use)) ? param->dtype() : c10::scalarTypeToTypeMeta(use.buffer_type);
}

// Of dense tensors.
bool overlap(const TensorImpl* a, const TensorImpl* b) {
  const char* const begin_a = data_of(a);
  const char* const begin_b = data_of(b);
  return begin_a < begin_b + b->numel_default() * static_cast<int64_t>(b->dtype().itemsize()) &&
         begin_b < begin_a + a->numel_default() * static_cast<int64_t>(a->dtype().itemsize());
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

// The value of `key`. As a rule it is the next entry, and reading that is cheaper than a look-up. Borrowed; null
// if it is missing.
inline PyObject* next_or_lookup(PyObject* dict, Py_ssize_t& position, PyObject* key) {
  PyObject* next = nullptr;
  PyObject* value = nullptr;
  if (PyDict_Next(dict, &position, &next, &value) != 0 && next == key) {
    return value;
  }
  value = PyDict_GetItemWithError(dict, key);
  if (value == nullptr && PyErr_Occurred() != nullptr) {
    throw py::error_already_set();
  }
  return value;
}

}  // namespace

template <class Layout>
void ParamWalk<Layout>::reset(PyObject* state) {
  state_ = state;
  for (auto& batch : batches_) {
    batch.updates.clear();
    batch.tensors.clear();
    batch.numel = 0;
  }
  frozen_.clear();
  fresh_.clear();
  copied_.clear();
  locals_.clear();
  wrappers_.clear();
  rest_.clear();
  skipped_.clear();
  shared_buffers_ = false;
  counts_gpu_on_host_ = false;
  holding_ = false;
  held_tensors_.clear();
  held_storages_.clear();
  held_objects_.clear();
  state_position_ = 0;
  state_misses_ = 0;
  states_found_ = 0;
}

template <class Layout>
C10_ALWAYS_INLINE WalkBatch<Layout>& ParamWalk<Layout>::batch_for(
    c10::Device device, c10::ScalarType param_type, c10::ScalarType grad_type, const GroupUse& use) {
  const bool stochastic = has_own_buffer_type(use);
  // As a rule there is one batch.
  for (auto& batch : batches_) {
    const BatchKind& kind = batch.kind;
    if (kind.device == device && kind.param_type == param_type && kind.grad_type == grad_type &&
        kind.stochastic == stochastic) {
      return batch;
    }
  }
  auto& batch = batches_.emplace_back();
  batch.kind = {device, param_type, grad_type, stochastic ? use.buffer_type : param_type, stochastic};
  return batch;
}

template <class Layout>
void ParamWalk<Layout>::skip(const py::list& rest) {
  for (const auto entry : rest) {
    const auto group = py::cast<py::tuple>(entry);
    for (const auto param : py::cast<py::list>(group[1])) {
      skipped_.insert({py::cast<int32_t>(group[0]), param.ptr()});
    }
  }
}

// Borrowed; null if it is missing.
template <class Layout>
C10_ALWAYS_INLINE PyObject* ParamWalk<Layout>::state_of(PyObject* param, bool exact) {
  // As a rule the state has the parameters in the same order, so the next entry is the right one, and it is next
  // in memory too. If the orders differ, the guessing soon stops.
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
  return find_state(state_, param, exact);
}

template <class Layout>
void ParamWalk<Layout>::hold(TensorImpl* tensor) {
  if (tensor != nullptr) {
    held_tensors_.emplace_back(c10::intrusive_ptr<TensorImpl>::reclaim_copy(tensor));
  }
}

template <class Layout>
void ParamWalk<Layout>::hold_from_here_on() {
  if (holding_) {
    return;
  }
  holding_ = true;
  for (const auto& batch : batches_) {
    for (const auto& tensors : batch.tensors) {
      hold(tensors.param);
      hold(tensors.grad);
      for (auto* held : tensors.slot) {
        hold(held);
      }
    }
  }
  for (auto* param : frozen_) {
    hold(param);
  }
  for (const auto& fresh : fresh_) {
    held_objects_.push_back(py::reinterpret_borrow<py::object>(fresh.param));
    held_objects_.push_back(py::reinterpret_borrow<py::object>(fresh.state));
  }
  // A tensor can be given another storage while it lives.
  held_storages_ = hold_storages();
}

// Whether the k-th slot's tensor may belong to another parameter too: one with a single reference cannot.
template <class Layout>
C10_ALWAYS_INLINE bool ParamWalk<Layout>::may_be_shared(const Slot& slot, int k) {
  const auto& storage = slot.held[k]->unsafe_storage();
  return Py_REFCNT(slot.held_object[k]) != 1 || Py_REFCNT(slot.state) != 1 || storage.use_count() != 1 ||
         !storage.unsafeGetStorageImpl()->resizable();
}

// Whether it shares memory with the parameter, its gradient or a slot before. The order of reads and writes then
// matters, and torch's form defines it.
template <class Layout>
bool ParamWalk<Layout>::overlaps_own(const Slot& slot, const TensorImpl* grad, int k) {
  const TensorImpl* const own = slot.held[k];
  bool any = overlap(own, slot.param) || overlap(own, grad);
  for (int other = 0; other < k; ++other) {
    any |= slot.held[other] != nullptr && overlap(own, slot.held[other]);
  }
  return any;
}

template <class Layout>
C10_ALWAYS_INLINE void ParamWalk<Layout>::push(
    const Slot& slot, TensorImpl* grad, const GroupUse& use, c10::ScalarType param_type,
    c10::ScalarType grad_type) {
  const auto itemsize = static_cast<int64_t>(c10::elementSize(param_type));
  const auto grad_itemsize =
      grad_type == param_type ? itemsize : static_cast<int64_t>(c10::elementSize(grad_type));
  const auto buffer_itemsize =
      C10_LIKELY(!has_own_buffer_type(use)) ? itemsize : static_cast<int64_t>(c10::elementSize(use.buffer_type));
  bool has_memory = true;
  char* const param_data = data_of(slot.param, itemsize, has_memory);
  char* const grad_data = data_of(grad, grad_itemsize, has_memory);
  std::array<char*, kBuffers> data{};
  for (int k = 0; k < kBuffers; ++k) {
    const TensorImpl* const buffer = slot.held[k];
    if (buffer == nullptr) {
      continue;
    }
    data[k] = data_of(buffer, buffer_itemsize, has_memory);
    if ((buffer->key_set().raw_repr() & cuda_keys) == 0) {
      prefetch(data[k], 1);
    }
    if (C10_UNLIKELY(may_be_shared(slot, k))) {
      shared_buffers_ = true;
      if (overlaps_own(slot, grad, k)) {
        leave(slot, use);
        return;
      }
    }
  }
  char* count_data = nullptr;
  if constexpr (kCounts) {
    if (const TensorImpl* const count = slot.held[kBuffers]; count != nullptr) {
      count_data = data_of(count, sizeof(float), has_memory);
      if (C10_UNLIKELY(may_be_shared(slot, kBuffers))) {
        shared_buffers_ = true;
        if (overlaps_own(slot, grad, kBuffers)) {
          leave(slot, use);
          return;
        }
      }
    }
  }
  if (C10_UNLIKELY(!has_memory)) {
    raise_no_memory(slot, grad, use);
  }
  // Memory of a file or of another library can begin at any address; the kernels read whole elements.
  const auto misalignment = [](const char* data, int64_t size) {
    return reinterpret_cast<uintptr_t>(data) & static_cast<uintptr_t>(size - 1);
  };
  uintptr_t misaligned = misalignment(param_data, itemsize) | misalignment(grad_data, grad_itemsize);
  misaligned |= misalignment(count_data, sizeof(float));
  for (const char* const buffer : data) {
    misaligned |= misalignment(buffer, buffer_itemsize);
  }
  if (C10_UNLIKELY(misaligned != 0)) {
    leave(slot, use);
    return;
  }
  auto& batch = batch_for(device_of_plain(slot.param), param_type, grad_type, use);
  // A state that holds the buffers alone has no mark.
  const bool stale = use.buffers != 0 && slot.state != nullptr &&
                     PyDict_GET_SIZE(slot.state) > use.buffers + (kCounts ? 1 : 0) && is_stale(slot.state, keys_);
  const bool fresh = use.buffers != 0 && (slot.held[0] == nullptr || stale);
  if (fresh) {
    const auto batch_index = static_cast<size_t>(&batch - batches_.data());
    Fresh& made = fresh_.emplace_back();
    made = {slot.object, slot.state, batch_index, batch.updates.size(), use.buffers};
    made.marked = stale;
    made.count_on_device = use.count_on_device;
    for (int k = 0; slot.held[0] != nullptr && k < kSlots; ++k) {
      if (is_used(k, use)) {
        made.held[k] = THPVariable_Unpack(slot.held_object[k]);
        made.enter = false;
      }
    }
  }
  const int64_t numel = slot.param->numel();
  TensorUpdate<Layout> update{
      {}, param_data, grad_data, {}, numel, use.index, static_cast<uint32_t>(slot.index) & kIndexMask, fresh};
  std::copy(data.begin(), data.end(), update.buffer);
  if constexpr (kCounts) {
    if (const TensorImpl* const count = slot.held[kBuffers]; count != nullptr) {
      update.count = reinterpret_cast<float*>(count_data);
      update.count_on_host = device_of_plain(count).is_cpu();
      counts_gpu_on_host_ |= update.count_on_host && batch.kind.device.is_cuda();
    }
  }
  batch.updates.push_back(update);
  batch.tensors.push_back({slot.object, slot.param, grad, slot.held});
  if (C10_UNLIKELY(holding_)) {
    held_storages_.push_back(slot.param->unsafe_storage());
    held_storages_.push_back(grad->unsafe_storage());
    for (const auto* held : slot.held) {
      if (held != nullptr) {
        held_storages_.push_back(held->unsafe_storage());
      }
    }
  }
  batch.numel += numel;
}

template <class Layout>
void ParamWalk<Layout>::push_unusual(
    const Slot& slot, TensorImpl* grad, const GroupUse& use, c10::ScalarType param_type,
    c10::ScalarType grad_type) {
  push(slot, grad, use, param_type, grad_type);
}

// Whether the state holds either all that a step of the group reads, or nothing; and a count that the kernels
// take.
template <class Layout>
C10_ALWAYS_INLINE bool ParamWalk<Layout>::has_usable_count(const Slot& slot, const GroupUse& use) {
  if constexpr (kCounts) {
    int missing = 0;
    for (int k = 0; k < kSlots; ++k) {
      missing += is_used(k, use) && slot.held[k] == nullptr ? 1 : 0;
    }
    const c10::TensorImpl* const count = slot.held[kBuffers];
    // A new count in double precision is torch's to make; with buffers of another dtype there is no such form.
    return missing == 0 ? is_count(count, slot.param)
                        : missing == use.buffers + 1 && (!use.count_in_double || has_own_buffer_type(use));
  }
  return true;
}

// The common case: plain, contiguous, of one type and on one device.
template <class Layout>
C10_ALWAYS_INLINE bool ParamWalk<Layout>::is_usual(const Slot& slot, const GroupUse& use) {
  const auto* const param = slot.param;
  const auto* const grad = slot.grad;
  uint64_t any = param->key_set().raw_repr() | grad->key_set().raw_repr();
  uint64_t all = param->key_set().raw_repr() & grad->key_set().raw_repr();
  for (int k = 0; k < kBuffers; ++k) {
    if (const auto* const buffer = slot.held[k]; buffer != nullptr) {
      any |= buffer->key_set().raw_repr();
      all &= buffer->key_set().raw_repr();
    }
  }
  if (!has_usable_count(slot, use)) {
    return false;
  }
  if ((any & ~plain_keys) != 0 || (all & tracked_keys) == 0 ||
      !param->is_contiguous_default(c10::MemoryFormat::Contiguous) || !fits(param, grad, param->dtype()) ||
      !has_kernel(type_of(param), has_own_buffer_type(use))) {
    return false;
  }
  const bool on_cpu = (any & cuda_keys) == 0;
  if (!on_cpu && (!has_kernel(c10::kCUDA) || grad->device() != param->device())) {
    return false;
  }
  for (int k = 0; k < kBuffers; ++k) {
    const auto* const buffer = slot.held[k];
    if (buffer != nullptr &&
        (!fits(param, buffer, buffer_type_of(param, use)) || (!on_cpu && buffer->device() != param->device()))) {
      return false;
    }
  }
  return true;
}

template <class Layout>
C10_ALWAYS_INLINE void ParamWalk<Layout>::emit(const Slot& slot, const GroupUse& use) {
  bool exact = slot.exact;
  for (int k = 0; k < kSlots; ++k) {
    exact &= slot.held[k] == nullptr || THPVariable_CheckExact(slot.held_object[k]);
  }
  if (C10_LIKELY(exact && is_usual(slot, use))) {
    push(slot, slot.grad, use, type_of(slot.param), type_of(slot.param));
  } else {
    emit_unusual(slot, use);
  }
}

template <class Layout>
void ParamWalk<Layout>::add_group(PyObject* params, const GroupUse& use) {
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
        // Hashing a subclass or reading its attributes can run its code, or a garbage collection.
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
    // From here on only parameters that have a gradient. Of the others, only the three lines above are read.
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
                       nullptr, {},
                       {}};
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
    if (use.buffers != 0 && !use.stock_form) {
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
        Py_ssize_t position = 0;
        const auto read = [&](int k) {
          PyObject* const held = next_or_lookup(slot.state, position, keys_.slot[k]);
          if (held != nullptr && held != Py_None) {
            if (C10_UNLIKELY(holding_)) {
              held_objects_.push_back(py::reinterpret_borrow<py::object>(held));
            }
            slot.held_object[k] = held;
            prefetch(held, 1);
          }
        };
        if constexpr (kCounts) {
          read(kBuffers);  // torch enters it first
        }
        for (int k = 0; k < (kBuffers == 1 ? 1 : use.buffers); ++k) {
          read(k);
        }
      }
    }
    for (Py_ssize_t i = 0; i < live; ++i) {
      auto& slot = slots[i];
      for (int k = 0; k < kSlots; ++k) {
        PyObject* const object = slot.held_object[k];
        if (object == nullptr) {
          continue;
        }
        if (!THPVariable_Check(object)) {
          throw py::type_error(
              c10::str(
                  function_, ": ", keys_.names[k], " of ", place(use, slot.index), " is a ",
                  Py_TYPE(object)->tp_name, "; it has to be a tensor or None"));
        }
        slot.held[k] = THPVariable_Unpack(object).unsafeGetTensorImpl();
        prefetch(slot.held[k], sizeof(TensorImpl));
      }
      prefetch_data(slot.param);
      prefetch_data(slot.grad);
    }
    for (Py_ssize_t i = 0; i < live; ++i) {
      for (const auto* held : slots[i].held) {
        if (held != nullptr) {
          prefetch_storage(held);
          touch_version(held);
        }
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

template <class Layout>
bool ParamWalk<Layout>::has_overlap() const {
  // Two parameters share memory only if they share a storage, or if foreign memory (of NumPy, of another process)
  // was wrapped more than once. So a set of storages decides the common case, and the intervals are compared
  // otherwise.
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
  written.reserve((1 + kSlots) * count);
  for (const auto& batch : batches_) {
    const auto note = [&](const void* data, int64_t numel, c10::ScalarType type) {
      if (data != nullptr) {
        const auto* const begin = static_cast<const char*>(data);
        written.push_back({begin, begin + numel * static_cast<int64_t>(c10::elementSize(type))});
      }
    };
    for (const auto& update : batch.updates) {
      note(update.param, update.numel, batch.kind.param_type);
      for (const void* const buffer : update.buffer) {
        note(buffer, update.numel, batch.kind.buffer_type);
      }
      if constexpr (kCounts) {
        note(update.count, 1, c10::kFloat);
      }
    }
  }
  const size_t before = written.size();
  merge(written);
  return written.size() < before;
}

template <class Layout>
void ParamWalk<Layout>::make_fresh_buffers(bool overlap) {
  if (fresh_.empty()) {
    return;
  }
  // Python objects are made and hashed below.
  hold_from_here_on();
  at::NoGradGuard no_grad;
  for (size_t i = 0; i < fresh_.size(); ++i) {
    auto& fresh = fresh_[i];
    auto& update = batches_[fresh.batch].updates[fresh.update];
    // A parameter in two groups: the second finds the buffers that the first has made. Where torch makes the state
    // before the update, this also holds if one group lists it twice.
    for (size_t j = overlap ? i : 0; j-- > 0;) {
      const auto& earlier = fresh_[j];
      if (earlier.param == fresh.param &&
          (kCounts || batches_[earlier.batch].updates[earlier.update].group != update.group)) {
        fresh.held = earlier.held;
        update.fresh = false;
        break;
      }
    }
    if constexpr (kCounts) {
      at::Tensor& count = fresh.held[kBuffers];
      if (!count.defined()) {
        const auto device = fresh.count_on_device ? batches_[fresh.batch].kind.device : c10::Device(c10::kCPU);
        count = at::zeros({}, at::TensorOptions().dtype(at::kFloat).device(device));
      }
      update.count = count.mutable_data_ptr<float>();
      update.count_on_host = count.is_cpu();
    }
    for (int k = 0; k < fresh.buffers; ++k) {
      at::Tensor& buffer = fresh.held[k];
      if (!buffer.defined()) {
        const auto& kind = batches_[fresh.batch].kind;
        const auto options = kind.stochastic ? at::TensorOptions().dtype(kind.buffer_type) : at::TensorOptions();
        buffer = at::empty_like(THPVariable_Unpack(fresh.param), options);
      }
      TensorImpl* own = buffer.unsafeGetTensorImpl();
      if (!is_plain(own)) {
        const auto dtensor = py::reinterpret_steal<py::object>(THPVariable_Wrap(buffer));
        own = locals_.emplace_back(local_of(dtensor)).unsafeGetTensorImpl();
      }
      update.buffer[k] = data_of(own);
    }
  }
  // Entering them fails half-way only if memory runs out. Then the entries made so far are removed.
  size_t entered = 0;
  try {
    for (; entered < fresh_.size(); ++entered) {
      auto& fresh = fresh_[entered];
      if (!fresh.enter) {
        continue;
      }
      // Not py::dict(), which does not say that memory is short.
      const auto entry = fresh.state != nullptr ? py::reinterpret_borrow<py::object>(fresh.state)
                                                : py::reinterpret_steal<py::object>(PyDict_New());
      bool made = static_cast<bool>(entry);
      const auto enter = [&](int k) {
        const auto held = py::reinterpret_steal<py::object>(THPVariable_Wrap(fresh.held[k]));
        made = made && held && PyDict_SetItem(entry.ptr(), keys_.slot[k], held.ptr()) == 0;
      };
      for (int k = 0; fresh.state != nullptr && k < kSlots; ++k) {
        fresh.replaced[k] = py::reinterpret_borrow<py::object>(PyDict_GetItem(fresh.state, keys_.slot[k]));
      }
      if constexpr (kCounts) {
        enter(kBuffers);  // in torch's order
      }
      for (int k = 0; k < fresh.buffers; ++k) {
        enter(k);
      }
      if (!made || (fresh.state == nullptr && PyDict_SetItem(state_, fresh.param, entry.ptr()) != 0)) {
        throw py::error_already_set();
      }
    }
  } catch (...) {
    py::error_scope keep;
    for (size_t i = std::min(entered + 1, fresh_.size()); i-- > 0;) {
      if (!fresh_[i].enter) {
        continue;
      }
      const Fresh& fresh = fresh_[i];
      const auto check = [](int failed) {
        if (failed != 0) {
          PyErr_Clear();
        }
      };
      if (fresh.state == nullptr) {
        check(PyDict_DelItem(state_, fresh.param));
        continue;
      }
      for (int k = 0; k < kSlots; ++k) {
        PyObject* const replaced = fresh.replaced[k].ptr();
        check(
            replaced != nullptr ? PyDict_SetItem(fresh.state, keys_.slot[k], replaced)
                                : PyDict_DelItem(fresh.state, keys_.slot[k]));
      }
    }
    throw;
  }
}

template <class Layout>
void ParamWalk<Layout>::unmark_fresh() {
  for (const auto& fresh : fresh_) {
    if (!fresh.marked) {
      continue;
    }
    // A buffer that this step did not use would be gone on from as soon as a step uses it again.
    for (int k = fresh.buffers; k < kBuffers; ++k) {
      PyObject* const unused = PyDict_GetItemWithError(fresh.state, keys_.slot[k]);
      if (unused != nullptr && PyDict_DelItem(fresh.state, keys_.slot[k]) != 0) {
        PyErr_Clear();
      }
    }
    if (PyDict_DelItem(fresh.state, keys_.stale) != 0) {
      PyErr_Clear();  // a parameter that is listed twice: gone already
    }
  }
}

template <class Layout>
bool ParamWalk<Layout>::has_idle_state() const {
  return PyDict_Size(state_) != states_found_;
}

template <class Layout>
void ParamWalk<Layout>::return_copied_grads() {
  at::NoGradGuard no_grad;
  for (auto& grad : copied_) {
    if (at::has_internal_overlap(grad.meta->grad_) == at::MemOverlap::Yes) {
      grad.meta->grad_ = std::move(grad.copy);  // an expanded gradient cannot be written to
    } else {
      grad.meta->grad_.copy_(grad.copy);
    }
  }
}

template <class Layout>
std::vector<c10::Storage> ParamWalk<Layout>::hold_storages() const {
  std::vector<c10::Storage> held;
  for (const auto& batch : batches_) {
    held.reserve(held.size() + (2 + kSlots) * batch.tensors.size());
    for (const auto& tensors : batch.tensors) {
      held.push_back(tensors.param->unsafe_storage());
      held.push_back(tensors.grad->unsafe_storage());
      for (const auto* slot : tensors.slot) {
        if (slot != nullptr) {
          held.push_back(slot->unsafe_storage());
        }
      }
    }
  }
  for (const auto& fresh : fresh_) {
    for (const auto& slot : fresh.held) {
      if (slot.defined()) {
        held.push_back(slot.storage());
      }
    }
  }
  for (const auto& local : locals_) {
    held.push_back(local.storage());
  }
  return held;
}

template <class Layout>
void ParamWalk<Layout>::bump_versions() {
  for (const auto& batch : batches_) {
    for (const auto& tensors : batch.tensors) {
      tensors.param->bump_version();
      for (auto* slot : tensors.slot) {
        if (slot != nullptr) {
          slot->bump_version();
        }
      }
    }
  }
  for (auto* wrapper : wrappers_) {
    wrapper->bump_version();
  }
}

template <class Layout>
void ParamWalk<Layout>::drop_frozen_grads() {
  // Freeing a gradient can run user code, so all are detached before the first one is freed.
  std::vector<at::Tensor> dropped;
  dropped.reserve(frozen_.size());
  for (auto* param : frozen_) {
    dropped.push_back(std::move(static_cast<AutogradMeta*>(param->autograd_meta())->grad_));
  }
  frozen_.clear();
}

// One instance for each number of buffers.
template class ParamWalk<StateLayout<1, false>>;
template class ParamWalk<StateLayout<3, true>>;

}  // namespace torch_freeze
