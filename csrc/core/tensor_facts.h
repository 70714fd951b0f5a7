// What the walk asks of one tensor: its layout, dtype, device and memory.
#pragma once

#include <c10/core/DispatchKeySet.h>
#include <c10/core/ScalarTypeToTypeMeta.h>
#include <c10/core/TensorImpl.h>

#include <cstdint>

namespace torch_freeze {

// Plain dense tensors: no sparse, quantised, nested, meta or wrapped ones, no pending negation or conjugation.
inline const uint64_t plain_keys = (c10::DispatchKeySet({c10::DispatchKey::CPU, c10::DispatchKey::CUDA}) |
                                    c10::autograd_dispatch_keyset_with_ADInplaceOrView |
                                    c10::getAutocastRelatedKeySetFromBackend(c10::BackendComponent::CPUBit) |
                                    c10::getAutocastRelatedKeySetFromBackend(c10::BackendComponent::CUDABit))
                                       .raw_repr();

inline bool is_plain(const c10::TensorImpl* tensor) { return (tensor->key_set().raw_repr() & ~plain_keys) == 0; }

inline const uint64_t cuda_keys = c10::DispatchKeySet(c10::BackendComponent::CUDABit).raw_repr();
inline const uint64_t beyond_host_keys = ~plain_keys | cuda_keys;

// There is only one CPU, so the keys alone say that a tensor is there.
inline c10::Device device_of_plain(const c10::TensorImpl* tensor) {
  return (tensor->key_set().raw_repr() & cuda_keys) == 0 ? c10::Device(c10::kCPU) : tensor->device();
}

// The key that is_inference() looks for.
inline const uint64_t tracked_keys = c10::DispatchKeySet(c10::DispatchKey::ADInplaceOrView).raw_repr();

// A count of updates that the kernels take: torch keeps it on the host or on the parameter's device.
inline bool is_count(const c10::TensorImpl* count, const c10::TensorImpl* param) {
  return is_plain(count) && (count->key_set().raw_repr() & tracked_keys) != 0 &&
         count->dtype() == caffe2::TypeMeta::Make<float>() && count->numel_default() == 1 &&
         (device_of_plain(count).is_cpu() || count->device() == param->device());
}

C10_ALWAYS_INLINE bool same_sizes(const c10::TensorImpl* a, const c10::TensorImpl* b) {
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

// The common case, in which nothing has to be converted or refused. Both tensors are plain, so their sizes are the
// default ones.
C10_ALWAYS_INLINE bool fits(const c10::TensorImpl* param, const c10::TensorImpl* tensor, caffe2::TypeMeta dtype) {
  return tensor->dtype() == dtype && tensor->is_contiguous_default(c10::MemoryFormat::Contiguous) &&
         same_sizes(param, tensor);
}

inline c10::ScalarType type_of(const c10::TensorImpl* tensor) {
  return c10::typeMetaToScalarType(tensor->dtype());
}

// Whether the elements of two dense tensors lie in the same order. Strides of dimensions of size 1 do not matter.
inline bool same_layout(const c10::TensorImpl* a, const c10::TensorImpl* b) {
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

// Null if there are no elements. The memory of a tensor can be freed while the tensor lives, as sharding does
// between uses; then `has_memory` becomes false. The elements of a dense tensor are contiguous in memory, so their
// number says where the last one is.
C10_ALWAYS_INLINE char* data_of(const c10::TensorImpl* tensor, int64_t itemsize, bool& has_memory) {
  const int64_t numel = tensor->numel_default();
  if (numel == 0) {
    return nullptr;
  }
  auto* storage = tensor->unsafe_storage().unsafeGetStorageImpl();
  const int64_t offset = tensor->storage_offset_default();
  has_memory &= static_cast<size_t>((offset + numel) * itemsize) <= storage->nbytes();
  return static_cast<char*>(storage->mutable_data()) + offset * itemsize;
}

inline char* data_of(const c10::TensorImpl* tensor) {
  bool any = true;
  return data_of(tensor, static_cast<int64_t>(tensor->itemsize()), any);
}

inline bool has_memory(const c10::TensorImpl* tensor) {
  bool yes = true;
  data_of(tensor, static_cast<int64_t>(tensor->itemsize()), yes);
  return yes;
}

// Wrapped tensors and those without fixed sizes.
inline bool is_opaque(const c10::TensorImpl* tensor) {
  constexpr c10::DispatchKeySet opaque(
      {c10::DispatchKey::Python, c10::DispatchKey::NestedTensor, c10::DispatchKey::FuncTorchBatched,
       c10::DispatchKey::FuncTorchGradWrapper, c10::DispatchKey::Functionalize});
  return tensor->key_set().has_any(opaque);
}

}  // namespace torch_freeze
