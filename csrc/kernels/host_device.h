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

// Before a loop whose arrays do not overlap: the host's compiler need not find that out at run time.
#if defined(__clang__)
#define TORCH_FREEZE_NO_OVERLAP _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__) && !defined(__CUDACC__)
#define TORCH_FREEZE_NO_OVERLAP _Pragma("GCC ivdep")
#else
#define TORCH_FREEZE_NO_OVERLAP
#endif
