// The launch on CUDA: one for all tensors of all param groups of one device and one combination of dtypes.
#pragma once

#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/macros/Macros.h>
#include <c10/util/Exception.h>
#include <cuda_runtime.h>

#include <array>
#include <atomic>
#include <cstdint>

#include "core/tensor_update.h"
#include "kernels/tile_formula.h"
#include "kernels/tiles.h"

namespace torch_freeze {

// 16, 8, 4 or 2 bytes as the registers that move them.
template <int kBytes>
struct Word {
  using type = uint4;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<4> {
  using type = unsigned int;
};
template <>
struct Word<2> {
  using type = unsigned short;
};

struct DeviceMemory {
  template <int kBytes, bool kStreamed>
  __device__ __forceinline__ void load(const char* from, uint32_t* raw) const {
    using Type = typename Word<kBytes>::type;
    static_assert(sizeof(Type) == kBytes);
    const auto* const address = reinterpret_cast<const Type*>(from);
    const Type word = kStreamed ? __ldcs(address) : *address;
    memcpy(raw, &word, kBytes);
  }
  template <int kBytes>
  __device__ __forceinline__ void store(char* to, const uint32_t* raw) const {
    using Type = typename Word<kBytes>::type;
    Type word;
    memcpy(&word, raw, kBytes);
    *reinterpret_cast<Type*>(to) = word;
  }
};

template <class Table>
__global__ void __launch_bounds__(
    multi_tensor::kThreads, multi_tensor::Shape<typename Table::Formula>::kBlocksPerMultiprocessor)
    multi_tensor_kernel(const __grid_constant__ Table table) {
  DeviceMemory memory;
  multi_tensor::update_block(table, memory, blockIdx.x, threadIdx.x);
}

// Blocks of the kernel for `Table` that run on the current device at once.
template <class Table>
uint32_t resident_blocks(c10::DeviceIndex device) {
  static std::array<std::atomic<uint32_t>, C10_COMPILE_TIME_MAX_GPUS> known{};
  std::atomic<uint32_t>& cached = known.at(device);
  uint32_t blocks = cached.load(std::memory_order_relaxed);
  if (blocks == 0) {
    int multiprocessors = 0;
    int per_multiprocessor = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
    C10_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
        &per_multiprocessor, multi_tensor_kernel<Table>, multi_tensor::kThreads, 0));
    blocks = static_cast<uint32_t>(multiprocessors * per_multiprocessor);
    cached.store(blocks, std::memory_order_relaxed);
  }
  return blocks;
}

template <class Table>
void launch_table(Table& table, c10::DeviceIndex device, cudaStream_t stream) {
  const uint32_t blocks = table.useful_blocks(resident_blocks<Table>(device));
  table.spread_over(blocks);
  // Not by <<<>>>, whose stub would copy the table once more.
  void* arguments[] = {&table};
  C10_CUDA_CHECK(cudaLaunchKernel(
      reinterpret_cast<const void*>(&multi_tensor_kernel<Table>), dim3(blocks), dim3(multi_tensor::kThreads),
      arguments, 0, stream));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

template <class Formula>
void launch_cuda(const UpdateBatch<Formula>& batch) {
  const c10::cuda::CUDAGuard guard(batch.kind.device);
  const c10::DeviceIndex device = guard.current_device().index();
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream(device).stream();
  const auto launch = [&](auto& table) { launch_table(table, device, stream); };
  c10::DataPtr
      counted;  // used by this stream alone, so that its memory may be taken again when this function ends
  if constexpr (Formula::State::kCounts) {
    if (counts_on_device(batch)) {
      counted = c10::cuda::CUDACachingAllocator::get()->allocate(
          static_cast<size_t>(batch.count) * sizeof(typename Formula::Counted));
      multi_tensor::for_each_table<CountFormula<Formula>>(
          CountSource<Formula>(batch, static_cast<double*>(counted.get())), launch);
    }
  }
  const bool known = for_each_table<Formula>(batch, counted.get(), launch);
  TORCH_CHECK_NOT_IMPLEMENTED(known, Formula::kName, " on ", no_kernel_for(batch.kind));
}

}  // namespace torch_freeze
