// Replaces ATen's CUDA kernels, as it is loaded: each operator runs its CPU kernel on CPU tensors that lie where
// the CUDA tensors lie.
//
// Work that runs at once returns what the CPU returns, brought back to the device. For work that runs later, or is
// recorded, the Meta kernel says how large the results are; the work itself holds none of the memory that it uses,
// as a kernel has no hold on it, so that memory which is reused too early is seen.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/SparseTensorImpl.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/cuda/CUDAGeneratorImpl.h>
#include <ATen/ops/copy_compositeexplicitautograd_dispatch.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>
#include <torch/csrc/distributed/c10d/Work.hpp>

#include <map>
#include <set>
#include <unordered_map>

#include "runtime.h"

void register_torch_freeze();

namespace {

using at::Tensor;
using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::IValue;
using cuda_on_cpu::When;
using torch::jit::Stack;

// Apply `change` to every tensor of a value.
template <class Change>
IValue map_tensors(const IValue& value, const Change& change) {
  if (value.isTensor()) {
    return change(value.toTensor());
  }
  if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (const Tensor& tensor : value.toTensorList()) {
      list.push_back(change(tensor));
    }
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<Tensor>> list;
    for (const std::optional<Tensor>& tensor : value.toOptionalTensorList()) {
      list.push_back(tensor.has_value() ? std::optional<Tensor>(change(*tensor)) : std::nullopt);
    }
    return list;
  }
  if (value.isList() && value.toListRef().size() != 0 && value.toListRef()[0].isTensorList()) {
    c10::List<c10::List<Tensor>> lists;
    for (const IValue& list : value.toListRef()) {
      lists.push_back(map_tensors(list, change).toTensorList());
    }
    return lists;
  }
  return value;
}

// CUDA's generators, each with one of the CPU's that starts over whenever it does.
at::Generator cpu_generator(const at::Generator& of, bool recorded) {
  struct Twin {
    uint64_t seed;
    at::Generator cpu;
  };
  static std::map<const void*, Twin> twins;
  auto generator = of;
  const std::lock_guard<std::mutex> lock(generator.mutex());
  const auto seed = generator.current_seed();
  const auto [twin, is_new] =
      twins.try_emplace(generator.unsafeGetGeneratorImpl(), Twin{seed, at::detail::createCPUGenerator(seed)});
  if (!recorded) {
    if (!is_new && (twin->second.seed != seed || generator.get_offset() == 0)) {
      twin->second.cpu.set_current_seed(seed);
      twin->second.seed = seed;
    }
    generator.set_offset(generator.get_offset() + 4);
  }
  return twin->second.cpu;
}

// A number that became a tensor weighs less in type promotion.
void keep_wrapped_number(const Tensor& from, const Tensor& to) {
  if (from.unsafeGetTensorImpl()->is_wrapped_number()) {
    to.unsafeGetTensorImpl()->set_wrapped_number(true);
  }
}

// The arguments of one call as the CPU takes them.
class Aliases {
 public:
  // Without a hold on the memory, as a kernel has none.
  Tensor of(const Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_cuda()) {
      return tensor;
    }
    const auto found = tensors_.find(tensor.unsafeGetTensorImpl());
    if (found != tensors_.end()) {
      return found->second;
    }
    if (tensor.is_sparse()) {
      const auto options = tensor.options().device(c10::kCPU);
      const auto alias = at::_sparse_coo_tensor_unsafe(
          of(tensor._indices()), of(tensor._values()), tensor.sizes(), options, tensor.is_coalesced());
      return keep(tensor, alias);
    }
    TORCH_CHECK(tensor.layout() == c10::kStrided, "simulated CUDA: no ", tensor.layout(), " tensors");
    const auto& storage = tensor.storage();
    auto& own = storages_[storage.unsafeGetStorageImpl()];
    if (!own) {
      own = c10::make_intrusive<c10::StorageImpl>(
          c10::StorageImpl::use_byte_size_t(), storage.nbytes(),
          c10::DataPtr(cuda_on_cpu::bytes_of(storage.mutable_data()), c10::kCPU), c10::GetAllocator(c10::kCPU),
          true);
      originals_.emplace(own.get(), storage);
    }
    auto alias = at::detail::make_tensor<c10::TensorImpl>(
        c10::Storage(own), DispatchKeySet(DispatchKey::CPU), tensor.dtype());
    auto* const impl = alias.unsafeGetTensorImpl();
    impl->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
    alias._set_conj(tensor.is_conj());
    alias._set_neg(tensor.is_neg());
    keep_wrapped_number(tensor, alias);
    return keep(tensor, alias);
  }

  // What the CPU returned, on the GPU.
  Tensor back(const Tensor& result, c10::Device device) {
    if (!result.defined()) {
      return result;
    }
    const auto source = sources_.find(result.unsafeGetTensorImpl());
    if (result.is_sparse()) {
      const Tensor indices = back(result._indices(), device);
      const Tensor values = back(result._values(), device);
      if (source == sources_.end()) {
        const auto options = result.options().device(device);
        return at::_sparse_coo_tensor_unsafe(indices, values, result.sizes(), options, result.is_coalesced());
      }
      auto* const impl = static_cast<at::SparseTensorImpl*>(source->second.unsafeGetTensorImpl());
      impl->raw_resize_(result.sparse_dim(), result.dense_dim(), result.sizes());
      impl->set_indices_and_values_unsafe(indices, values);
      return source->second._coalesced_(result.is_coalesced());
    }
    if (source != sources_.end()) {
      return follow(source->second, result);
    }
    const auto original = originals_.find(result.storage().unsafeGetStorageImpl());
    if (original != originals_.end()) {
      auto view = at::detail::make_tensor<c10::TensorImpl>(
          c10::Storage(original->second), DispatchKeySet(DispatchKey::CUDA), result.dtype());
      view.unsafeGetTensorImpl()->set_sizes_and_strides(result.sizes(), result.strides(), result.storage_offset());
      return view;
    }
    auto copy = like(result, device);
    Aliases().of(copy).copy_(result);
    return copy;
  }

  // Of a result that was given its memory by the caller, and may have been resized.
  static Tensor follow(const Tensor& source, const Tensor& result) {
    if (result.sizes() != source.sizes() || result.strides() != source.strides()) {
      source.resize_(result.sizes());
      source.unsafeGetTensorImpl()->set_sizes_and_strides(
          result.sizes(), result.strides(), source.storage_offset());
    }
    if (result.device().is_cpu() && result.numel() != 0) {
      const Tensor lies = Aliases().of(source);
      if (lies.data_ptr() != result.data_ptr()) {
        lies.copy_(result);
      }
    }
    return source;
  }

  static Tensor like(const Tensor& result, c10::Device device) {
    const auto options = at::TensorOptions(device).dtype(result.dtype());
    return result.is_non_overlapping_and_dense() ? at::empty_strided(result.sizes(), result.strides(), options)
                                                 : at::empty(result.sizes(), options);
  }

 private:
  Tensor keep(const Tensor& tensor, const Tensor& alias) {
    tensors_.emplace(tensor.unsafeGetTensorImpl(), alias);
    sources_.emplace(alias.unsafeGetTensorImpl(), tensor);
    return alias;
  }

  std::unordered_map<c10::TensorImpl*, Tensor> tensors_;
  std::unordered_map<c10::StorageImpl*, c10::intrusive_ptr<c10::StorageImpl>> storages_;
  std::unordered_map<c10::StorageImpl*, c10::Storage> originals_;
  std::unordered_map<c10::TensorImpl*, Tensor> sources_;
};

bool any_sparse(const Stack& arguments) {
  bool any = false;
  for (const auto& argument : arguments) {
    map_tensors(argument, [&](const Tensor& tensor) {
      any |= tensor.defined() && tensor.is_sparse();
      return tensor;
    });
  }
  return any;
}

c10::Device device_of(const Stack& arguments) {
  std::optional<c10::Device> device;
  const auto look = [&](const Tensor& tensor) {
    if (!device && tensor.defined() && tensor.is_cuda()) {
      device = tensor.device();
    }
    return tensor;
  };
  for (const auto& argument : arguments) {
    map_tensors(argument, look);
    if (!device && argument.isDevice() && argument.toDevice().is_cuda()) {
      device = argument.toDevice();
    }
  }
  const auto current = c10::cuda::current_device();
  return device && device->has_index() ? *device : c10::Device(c10::kCUDA, current);
}

// As torch's own registrations do: aliases would work wherever they lie.
void check_one_device(const std::string& name, const Stack& arguments, c10::Device device) {
  for (const char* const mixed : {"aten::index", "aten::_index", "aten::_unsafe_index", "aten::_amp_"}) {
    if (name.rfind(mixed, 0) == 0) {
      return;
    }
  }
  for (const auto& argument : arguments) {
    if (argument.isTensor() && argument.toTensor().defined()) {
      const Tensor& tensor = argument.toTensor();
      TORCH_CHECK(
          tensor.device() == device || (tensor.is_cpu() && tensor.dim() == 0),
          "Expected all tensors to be on the same device, but found at least two devices, ", device, " and ",
          tensor.device(), "! (", name, ")");
    }
  }
}

// Operators of which the host waits for the result.
bool waits(const c10::FunctionSchema& schema, const Stack& arguments) {
  static const std::set<std::string> kWaiting = {"aten::nonzero",    "aten::masked_select",      "aten::_unique2",
                                                 "aten::unique_dim", "aten::unique_consecutive", "aten::bincount",
                                                 "aten::equal",      "aten::repeat_interleave",  "aten::histc"};
  if (kWaiting.count(schema.name()) != 0 || schema.name().rfind("aten::_to_sparse", 0) == 0 ||
      any_sparse(arguments)) {
    return true;
  }
  bool masked = false;
  if (schema.name().rfind("aten::index", 0) == 0) {
    for (const auto& argument : arguments) {
      if (argument.isOptionalTensorList()) {
        map_tensors(argument, [&](const Tensor& index) {
          masked |= index.defined() && (index.scalar_type() == at::kBool || index.scalar_type() == at::kByte);
          return index;
        });
      }
    }
  }
  return masked;
}

void run_on_cpu(const c10::OperatorHandle& op, Stack* stack) {
  const auto& schema = op.schema();
  const auto count = schema.arguments().size();
  const std::string name = schema.name() + (schema.overload_name().empty() ? "" : "." + schema.overload_name());
  const Stack arguments(stack->end() - static_cast<std::ptrdiff_t>(count), stack->end());
  const auto key = any_sparse(arguments) ? DispatchKey::SparseCPU : DispatchKey::CPU;
  TORCH_CHECK_NOT_IMPLEMENTED(
      op.hasComputedKernelForDispatchKey(key), "simulated CUDA: ", name, " has no ", key, " kernel");
  const auto device = device_of(arguments);
  check_one_device(name, arguments, device);
  const c10::cuda::CUDAGuard guard(device);
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const auto stream = c10::cuda::getCurrentCUDAStream(device.index()).stream();
  auto when = cuda_on_cpu::when_runs(stream);

  if (waits(schema, arguments)) {
    TORCH_CHECK(when != When::kRecorded, name, ": operation not permitted when stream is capturing");
    if (c10::cuda::warning_state().get_sync_debug_mode() != c10::cuda::SyncDebugMode::L_DISABLED) {
      c10::cuda::warn_or_error_on_sync();
    }
    cuda_on_cpu::run_now(stream, "sync", name, [] {});
    when = When::kNow;
  }
  bool changes_sizes = false;  // of what it is given
  bool fresh = false;          // results of its own
  bool deferrable = true;
  for (const auto& argument : schema.arguments()) {
    changes_sizes |= argument.kwarg_only() && argument.alias_info() != nullptr && argument.alias_info()->isWrite();
  }
  for (const auto& result : schema.returns()) {
    fresh |= result.alias_info() == nullptr;
    deferrable &= result.type()->isSubtypeOf(*c10::TensorType::get()) ||
                  result.type()->isSubtypeOf(*c10::ListType::ofTensors());
  }

  // Nothing above counts the versions of what these write: CUDA's kernels do, as the CPU's single ones do.
  if (schema.name().rfind("aten::_foreach_", 0) == 0) {
    for (size_t i = 0; i < count; ++i) {
      const auto* const alias = schema.arguments()[i].alias_info();
      if (alias != nullptr && alias->isWrite()) {
        map_tensors(arguments[i], [](const Tensor& tensor) {
          tensor.unsafeGetTensorImpl()->bump_version();
          return tensor;
        });
      }
    }
  }

  Aliases aliases;
  const auto to_cpu = [&](Stack given) {
    for (size_t i = 0; i < given.size(); ++i) {
      auto& value = given[i];
      const auto& type = schema.arguments()[i].type();
      if (value.isDevice() && value.toDevice().is_cuda()) {
        value = c10::Device(c10::kCPU);
      } else if (value.isGenerator() && value.toGenerator().device().is_cuda()) {
        value = cpu_generator(value.toGenerator(), when == When::kRecorded);
      } else if (value.isNone() && type->str() == "Generator?") {
        value = cpu_generator(at::cuda::detail::getDefaultCUDAGenerator(device.index()), when == When::kRecorded);
      } else {
        value = map_tensors(value, [&](const Tensor& tensor) { return aliases.of(tensor); });
      }
      if (value.isGenerator() && when == When::kLater) {
        when = When::kNow;  // random numbers are drawn in the order of the calls
      }
    }
    return given;
  };

  // What its results look like, from the kernels that compute nothing else.
  Stack results;
  if (when != When::kNow && deferrable && (fresh || changes_sizes)) {
    std::unordered_map<c10::TensorImpl*, Tensor> metas;
    std::unordered_map<c10::TensorImpl*, Tensor> sources;
    const auto meta_of = [&](const Tensor& tensor) -> Tensor {
      if (!tensor.defined() || tensor.unsafeGetTensorImpl()->is_wrapped_number()) {
        return tensor;
      }
      auto& meta = metas[tensor.unsafeGetTensorImpl()];
      if (!meta.defined()) {
        meta = at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(c10::kMeta));
        sources.emplace(meta.unsafeGetTensorImpl(), tensor);
      }
      return meta;
    };
    Stack shapes;
    for (const auto& argument : arguments) {
      shapes.push_back(argument.isDevice() ? IValue(c10::Device(c10::kMeta)) : map_tensors(argument, meta_of));
    }
    try {
      op.redispatchBoxed(DispatchKeySet(DispatchKey::Meta), &shapes);
      for (const auto& shape : shapes) {
        results.push_back(map_tensors(shape, [&](const Tensor& result) {
          const auto source = result.defined() ? sources.find(result.unsafeGetTensorImpl()) : sources.end();
          return source != sources.end() ? Aliases::follow(source->second, result)
                 : result.defined()      ? Aliases::like(result, device)
                                         : result;
        }));
      }
    } catch (const c10::NotImplementedError&) {
      deferrable = false;
    }
  }
  if (when != When::kNow && !deferrable) {
    TORCH_CHECK(when != When::kRecorded, "simulated CUDA: ", name, " cannot be captured: it has no meta kernel");
    when = When::kNow;
  }
  Stack given = to_cpu(arguments);

  if (when == When::kNow) {
    cuda_on_cpu::run_now(stream, "op", name, [&] { op.redispatchBoxed(DispatchKeySet(key), &given); });
    torch::jit::drop(*stack, count);
    for (const auto& result : given) {
      stack->push_back(map_tensors(result, [&](const Tensor& tensor) { return aliases.back(tensor, device); }));
    }
    return;
  }
  if (results.empty() && !schema.returns().empty()) {  // in place: what it is given is what it returns
    for (const auto& result : schema.returns()) {
      for (size_t i = 0; i < count; ++i) {
        const auto* const alias = schema.arguments()[i].alias_info();
        if (alias != nullptr && *alias == *result.alias_info()) {
          results.push_back(arguments[i]);
        }
      }
    }
  }
  Stack targets;
  for (const auto& result : results) {
    targets.push_back(map_tensors(result, [&](const Tensor& tensor) { return aliases.of(tensor); }));
  }
  cuda_on_cpu::enqueue(stream, "op", name, [op, given, targets] {
    // Of no mode that the thread is in, which may be any.
    const c10::impl::ForceDispatchKeyGuard keys(
        c10::default_included_set, c10::default_excluded_set | c10::autograd_dispatch_keyset_with_ADInplaceOrView);
    Stack made = given;
    op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), &made);
    for (size_t i = 0; i < targets.size(); ++i) {
      const auto put = [](const Tensor& target, const Tensor& from) {
        // Statistics that a norm saves for no backward are empty on the CPU.
        if (target.defined() && from.defined() && !target.is_same(from) && from.numel() != 0) {
          target.copy_(from);
        }
      };
      if (targets[i].isTensor()) {
        put(targets[i].toTensor(), made[i].toTensor());
      } else if (targets[i].isTensorList()) {
        for (size_t j = 0; j < targets[i].toTensorList().size(); ++j) {
          put(targets[i].toTensorList().get(j), made[i].toTensorList().get(j));
        }
      }
    }
  });
  torch::jit::drop(*stack, count);
  stack->insert(stack->end(), results.begin(), results.end());
}

Tensor& copy(Tensor& to, const Tensor& from, bool non_blocking) {
  if (to.device() != from.device()) {
    // The runtime's copies and synchronisations, as torch makes them; what converts comes back here.
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return at::compositeexplicitautograd::copy_(to, from, non_blocking);
  }
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::copy_", "");
  Stack stack{to, from, non_blocking};
  run_on_cpu(op, &stack);
  return to;
}

// The collectives of torch.distributed, by gloo's on the CPU. Each has ended when it returns.
void run_collective(const c10::OperatorHandle& op, Stack* stack) {
  const auto count = op.schema().arguments().size();
  const Stack arguments(stack->end() - static_cast<std::ptrdiff_t>(count), stack->end());
  const auto device = device_of(arguments);
  const c10::cuda::CUDAGuard guard(device);
  const auto stream = c10::cuda::getCurrentCUDAStream(device.index()).stream();
  TORCH_CHECK(
      cuda_on_cpu::when_runs(stream) != When::kRecorded, "simulated CUDA: ", op.schema().name(),
      " cannot be captured");
  Aliases aliases;
  Stack given;
  for (const auto& argument : arguments) {
    given.push_back(map_tensors(argument, [&](const Tensor& tensor) { return aliases.of(tensor); }));
  }
  cuda_on_cpu::run_now(stream, "op", op.schema().name(), [&] {
    op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), &given);
    for (const auto& result : given) {
      if (result.isCustomClass()) {
        result.toCustomClass<c10d::Work>()->wait();
      }
    }
  });
  torch::jit::drop(*stack, count);
  for (const auto& result : given) {
    stack->push_back(map_tensors(result, [&](const Tensor& tensor) { return aliases.back(tensor, device); }));
  }
}

// Operators that only look at sizes, or make memory, or are copies to the host: torch's own serve.
bool stays(const c10::FunctionSchema& schema) {
  static const std::set<std::string> kOwn = {
      "aten::empty", "aten::empty_strided", "aten::_efficientzerotensor", "aten::resize_", "aten::set_",
      "aten::record_stream", "aten::_local_scalar_dense", "aten::is_set_to", "aten::_pin_memory",
      "aten::is_pinned", "aten::copy_", "aten::_copy_from", "aten::as_strided_",
      // Of sparse tensors: what only looks at their parts, or is made of operators on these.
      "aten::_coalesced_", "aten::_dimI", "aten::_dimV", "aten::_nnz", "aten::_sparse_coo_tensor_with_dims",
      "aten::_sparse_coo_tensor_with_dims_and_tensors", "aten::copy_sparse_to_sparse_", "aten::dense_dim",
      "aten::is_coalesced", "aten::resize_as_sparse_", "aten::sparse_dim", "aten::sparse_resize_",
      "aten::sparse_resize_and_clear_"};
  if (kOwn.count(schema.name()) != 0 || schema.name().rfind("aten::_cudnn_", 0) == 0) {
    return true;
  }
  for (const auto& result : schema.returns()) {
    if (result.alias_info() != nullptr && !result.alias_info()->isWrite()) {
      return true;  // a view
    }
  }
  return false;
}

// Puts `kernel` in the place of all kernels of a key, and where there is none, of `composites`.
template <void (*kernel)(const c10::OperatorHandle&, Stack*)>
torch::Library& replace(const std::string& space, DispatchKey key, const std::set<std::string>& composites = {}) {
  // Never destroyed: torch's own static objects, which it would need, may go before it.
  auto& library =
      *new torch::Library(torch::Library::IMPL, space.substr(0, space.find(':')), key, __FILE__, __LINE__);
  for (const auto& name : c10::Dispatcher::singleton().getAllOpNames()) {
    const auto op = c10::Dispatcher::singleton().findSchema(name);
    if (name.name.rfind(space, 0) == 0 && op && !stays(op->schema()) &&
        (op->hasKernelForDispatchKey(key) || composites.count(name.name) != 0)) {
      library.impl(
          (name.name + (name.overload_name.empty() ? "" : "." + name.overload_name)).c_str(),
          torch::CppFunction::makeFromBoxedFunction<kernel>());
    }
  }
  return library;
}

bool install() {
  // The CPU has no counterpart of these.
  at::globalContext().setUserEnabledCuDNN(false);
  at::globalContext().setSDPUseFlash(false);
  at::globalContext().setSDPUseMemEfficient(false);
  at::globalContext().setSDPUseCuDNN(false);
  register_torch_freeze();
  cuda_on_cpu::register_kernel("spin_kernel", 0, nullptr);  // of torch.cuda._sleep
  // Composites that ask for the device and call cuDNN, beside what has a kernel for CUDA.
  auto& dense =
      replace<&run_on_cpu>("aten::", DispatchKey::CUDA, {"aten::convolution", "aten::convolution_backward"});
  dense.impl("copy_", &copy);
  replace<&run_on_cpu>("aten::", DispatchKey::SparseCUDA);
  replace<&run_collective>("c10d::", DispatchKey::CUDA);
  return true;
}

const bool installed = install();

}  // namespace
