// How a function is written once for the host compiler and nvcc.
#pragma once

#if defined(__CUDACC__)
#define TORCH_FREEZE_INLINE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define TORCH_FREEZE_INLINE inline __attribute__((always_inline))
#else
#define TORCH_FREEZE_INLINE inline
#endif

// Before a loop over a register array: it must not survive as a loop, since registers have no index.
#if defined(__CUDACC__)
#define TORCH_FREEZE_UNROLL _Pragma("unroll")
#else
#define TORCH_FREEZE_UNROLL
#endif
