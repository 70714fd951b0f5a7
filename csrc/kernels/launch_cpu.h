// The launch on the CPU: one parallel region, vectorised for what torch itself picked on this machine.
#pragma once

#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <string>
#include <type_traits>

#include "core/dtypes.h"
#include "core/tensor_update.h"
#include "kernels/formula_base.h"
#include "kernels/host_device.h"
#include "kernels/spans_cpu.h"
#include "kernels/stochastic_rounding.h"
#include "kernels/torch_sqrt.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define TORCH_FREEZE_X86 1
#include <immintrin.h>
#endif

namespace torch_freeze {
namespace cpu {

// Stock rounds once where its vector type has a fused multiply-add, twice where it has none.
struct FusedArith {
  static constexpr bool kDividesTwice = true;
  static TORCH_FREEZE_INLINE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
  static TORCH_FREEZE_INLINE double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
  static TORCH_FREEZE_INLINE float sqrt(float x) { return __builtin_sqrtf(x); }
  static TORCH_FREEZE_INLINE double sqrt(double x) { return __builtin_sqrt(x); }
};
struct SeparateArith {
  static constexpr bool kDividesTwice = true;
  static TORCH_FREEZE_INLINE float sqrt(float x) { return __builtin_sqrtf(x); }
  static TORCH_FREEZE_INLINE double sqrt(double x) { return __builtin_sqrt(x); }
  template <class T>
  static TORCH_FREEZE_INLINE T fma(T a, T b, T c) {
    return a * b + c;
  }
};

// Large spans come from DRAM, whose pages the hardware's own prefetching does not cross: asking this far ahead
// gains a tenth of the bandwidth. Measured with 512 to 8192 bytes; 1024 and 2048 are alike, more or less is worse.
constexpr int64_t kAheadBytes = 1024;
constexpr int64_t kStrideBytes = 256;
constexpr int64_t kLineBytes = 64;
constexpr int64_t kPrefetchNumel = 4096;  // shorter spans are done before it pays

template <class T>
TORCH_FREEZE_INLINE void prefetch_stride(const T* at) {
  const auto* const ahead = reinterpret_cast<const char*>(at) + kAheadBytes;
  for (int64_t line = 0; line < kStrideBytes; line += kLineBytes) {
    __builtin_prefetch(ahead + line, 1);
  }
}

// How the optimizer's buffers are kept. As a rule in the parameter's type, either directly or through the blocks
// below.
struct NearestRounding {
  static NearestRounding of(uint64_t, uint32_t, int64_t) { return {}; }
  TORCH_FREEZE_INLINE NearestRounding at(int64_t) const { return *this; }
  template <class T>
  TORCH_FREEZE_INLINE T load(T value) const {
    return value;
  }
  template <class T>
  TORCH_FREEZE_INLINE T store(T value, int, int64_t) const {
    return value;
  }
};

// At most this many elements are rounded at a time, beginning at a multiple of it, so that the upper halves of
// their positions are the same.
constexpr int64_t kRunNumel = 64;
static_assert(kSplitNumel % kRunNumel == 0, "a thread's share begins with a run");

struct StochasticRounding {
  RoundingKey key;
  int64_t first;  // the place of element 0

  static StochasticRounding of(uint64_t seed, uint32_t index, int64_t first) {
    return {rounding_key(seed, index), first};
  }
  TORCH_FREEZE_INLINE StochasticRounding at(int64_t element) const { return {key, first + element}; }
  TORCH_FREEZE_INLINE float load(c10::BFloat16 narrow) const {
    const uint32_t bits = static_cast<uint32_t>(narrow.x) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }
  // The element of the k-th buffer.
  TORCH_FREEZE_INLINE c10::BFloat16 store(float value, int k, int64_t element) const {
    const uint32_t low = static_cast<uint32_t>(first) + static_cast<uint32_t>(element);
    const uint32_t random = rounding_bits(buffer_key(key, k), low, static_cast<uint32_t>(first >> 32));
    return {static_cast<uint16_t>(round_to_bfloat16(value, random)), c10::BFloat16::from_bits()};
  }
};

// Narrow types pass through this many fp32 elements at a time, and gradients are unscaled so: all in L1.
constexpr int64_t kBlockNumel = 512;

// The arrays of one tensor, or of a part of it.
template <class T, class Grad, class Buffer, int kBuffers>
struct Arrays {
  T* param;
  Grad* grad;
  std::array<Buffer*, kBuffers> buffers;

  TORCH_FREEZE_INLINE Arrays at(int64_t element) const {
    Arrays arrays{param + element, grad + element, {}};
    for (int k = 0; k < kBuffers; ++k) {
      arrays.buffers[k] = buffers[k] == nullptr ? nullptr : buffers[k] + element;
    }
    return arrays;
  }
};

// What the formula multiplies by, for one tensor.
template <class Formula, class T>
struct AllScalars {
  typename Formula::template Scalars<T> group;
  typename Formula::template TensorScalars<T> tensor;
};

template <class Variant, class Arith, class Formula, class T, class Buffer, class Rounding>
TORCH_FREEZE_INLINE void update_run(
    const Arrays<T, const T, Buffer, Formula::kBuffers>& arrays, int64_t n, const AllScalars<Formula, T>& s,
    Rounding rounding) {
  constexpr int kBuffers = Formula::kBuffers;
  constexpr int kUsed = Formula::buffers_used(Variant::kBits);
  T* const param = arrays.param;
  const T* const grad = arrays.grad;
  const std::array<Buffer*, kBuffers> buffers = arrays.buffers;
  TORCH_FREEZE_NO_OVERLAP
  for (int64_t i = 0; i < n; ++i) {
    T p = param[i];
    T values[kBuffers];
    for (int k = 0; k < kBuffers; ++k) {
      values[k] = k < kUsed ? rounding.load(buffers[k][i]) : T(0);
    }
    Formula::template element<Variant, Arith>(p, grad[i], values, s.group, s.tensor);
    for (int k = 0; k < kUsed; ++k) {
      buffers[k][i] = rounding.store(values[k], k, i);
    }
    param[i] = p;
  }
}

template <class Variant, class Arith, class Formula, class T, class Buffer, class Rounding>
TORCH_FREEZE_INLINE void update_block(
    Arrays<T, const T, Buffer, Formula::kBuffers> arrays, int64_t n, const AllScalars<Formula, T>& scalars,
    Rounding rounding) {
  const AllScalars<Formula, T> s = scalars;
  constexpr int kUsed = Formula::buffers_used(Variant::kBits);
  constexpr auto kStride = kStrideBytes / static_cast<int64_t>(sizeof(T));
  constexpr bool kNearest = std::is_same_v<Rounding, NearestRounding>;
  static_assert(kNearest || kStride == kRunNumel);
  const bool ahead = n >= kPrefetchNumel;
  if (ahead || !kNearest) {
    for (; n >= kStride; n -= kStride) {
      if (ahead) {
        prefetch_stride(arrays.param);
        prefetch_stride(arrays.grad);
      }
      update_run<Variant, Arith, Formula>(arrays, kStride, s, rounding);
      for (int k = 0; ahead && k < kUsed; ++k) {
        prefetch_stride(arrays.buffers[k]);
      }
      arrays = arrays.at(kStride);
      rounding = rounding.at(kStride);
    }
  }
  update_run<Variant, Arith, Formula>(arrays, n, s, rounding);
}

// A block of at most kBlockNumel elements with torch's square roots: what comes before the roots, all of these at
// once, and what comes after. Prefetching gains nothing here, since that takes longer than the memory.
template <class Variant, class Arith, class Formula, class T>
TORCH_FREEZE_INLINE void update_block_with_torch_roots(
    const Arrays<T, const T, T, Formula::kBuffers>& block, int64_t n, const AllScalars<Formula, T>& scalars) {
  constexpr int kBuffers = Formula::kBuffers;
  constexpr int kUsed = Formula::buffers_used(Variant::kBits);
  const AllScalars<Formula, T> s = scalars;
  alignas(64) T roots[kBlockNumel];
  T* const param = block.param;
  const T* const grad = block.grad;
  const std::array<T*, kBuffers> buffers = block.buffers;
  TORCH_FREEZE_NO_OVERLAP
  for (int64_t i = 0; i < n; ++i) {
    T values[kBuffers];
    for (int k = 0; k < kBuffers; ++k) {
      values[k] = k < kUsed ? buffers[k][i] : T(0);
    }
    roots[i] = Formula::template before_root<Variant, Arith>(param[i], grad[i], values, s.group, s.tensor);
    for (int k = 0; k < kUsed; ++k) {
      buffers[k][i] = values[k];
    }
  }
  torch_sqrt(roots, n);
  const T* const first = buffers[0];
  TORCH_FREEZE_NO_OVERLAP
  for (int64_t i = 0; i < n; ++i) {
    T p = param[i];
    Formula::template after_root<Variant, Arith>(p, first[i], roots[i], s.group, s.tensor);
    param[i] = p;
  }
}

template <bool kTorchRoots, class Variant, class Arith, class Formula, class T, class Buffer, class Rounding>
TORCH_FREEZE_INLINE void update_part(
    const Arrays<T, const T, Buffer, Formula::kBuffers>& arrays, int64_t n, const AllScalars<Formula, T>& scalars,
    Rounding rounding) {
  if constexpr (kTorchRoots) {
    update_block_with_torch_roots<Variant, Arith, Formula>(arrays, n, scalars);
  } else {
    update_block<Variant, Arith, Formula>(arrays, n, scalars, rounding);
  }
}

using Bits32 [[gnu::may_alias]] = uint32_t;
using Bits16 [[gnu::may_alias]] = uint16_t;

TORCH_FREEZE_INLINE void widen_bfloat16(const c10::BFloat16* from, float* to, int64_t n) {
  const auto* in = reinterpret_cast<const Bits16*>(from);
  auto* out = reinterpret_cast<Bits32*>(to);
  for (int64_t i = 0; i < n; ++i) {
    out[i] = static_cast<uint32_t>(in[i]) << 16;
  }
}

// Round to nearest, ties to even; every NaN becomes the quiet one, as c10::BFloat16 does.
TORCH_FREEZE_INLINE void narrow_bfloat16(const float* from, c10::BFloat16* to, int64_t n) {
  const auto* in = reinterpret_cast<const Bits32*>(from);
  auto* out = reinterpret_cast<Bits16*>(to);
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = in[i];
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    out[i] = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
  }
}

// What differs from one instruction set to the next: rounding, and how fp16 is widened and narrowed.
struct Baseline {
  static void widen(const c10::Half* from, float* to, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      to[i] = static_cast<float>(from[i]);
    }
  }
  static void narrow(const float* from, c10::Half* to, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      to[i] = static_cast<c10::Half>(from[i]);
    }
  }
};

#ifdef TORCH_FREEZE_X86
struct F16c {
  __attribute__((target("avx2,f16c"))) static void widen(const c10::Half* from, float* to, int64_t n) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
    }
    Baseline::widen(from + i, to + i, n - i);
  }
  __attribute__((target("avx2,f16c"))) static void narrow(const float* from, c10::Half* to, int64_t n) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
      _mm_storeu_si128(
          reinterpret_cast<__m128i*>(to + i),
          _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    Baseline::narrow(from + i, to + i, n - i);
  }
};
#endif

template <class Convert>
TORCH_FREEZE_INLINE void widen(const c10::BFloat16* from, float* to, int64_t n) {
  widen_bfloat16(from, to, n);
}
template <class Convert>
TORCH_FREEZE_INLINE void widen(const c10::Half* from, float* to, int64_t n) {
  Convert::widen(from, to, n);
}
template <class Convert>
TORCH_FREEZE_INLINE void narrow(const float* from, c10::BFloat16* to, int64_t n) {
  narrow_bfloat16(from, to, n);
}
template <class Convert>
TORCH_FREEZE_INLINE void narrow(const float* from, c10::Half* to, int64_t n) {
  Convert::narrow(from, to, n);
}

// One tensor, or a part of it that one thread updates.
template <class Formula, class Types>
struct Span {
  Arrays<typename Types::Param, typename Types::Param, typename Types::Buffer, Formula::kBuffers> arrays;
  int64_t numel;
  const AllScalars<Formula, typename Types::Value>& scalars;
  const float* grad_scale;
};

template <class Variant, class Arith, class Convert, bool kTorchRoots, class Formula, class Types, class Rounding>
TORCH_FREEZE_INLINE void update_span(const Span<Formula, Types>& span, Rounding rounding) {
  const auto& [arrays, n, scalars, grad_scale] = span;
  using T = typename Types::Param;
  using Value = typename Types::Value;
  constexpr int kBuffers = Formula::kBuffers;
  constexpr int kUsed = Formula::buffers_used(Variant::kBits);
  constexpr bool kNarrow = !std::is_same_v<T, Value>;
  constexpr bool kNarrowBuffers = kNarrow && !Types::kStochastic;
  if constexpr (!kNarrow && !kTorchRoots) {
    if (grad_scale == nullptr) {
      update_block<Variant, Arith, Formula>(
          Arrays<T, const T, typename Types::Buffer, kBuffers>{arrays.param, arrays.grad, arrays.buffers}, n,
          scalars, rounding);
      return;
    }
  }
  const Value scale = grad_scale == nullptr ? Value(1) : static_cast<Value>(*grad_scale);
  for (int64_t i = 0; i < n; i += kBlockNumel) {
    const int64_t size = n - i < kBlockNumel ? n - i : kBlockNumel;
    const auto part = arrays.at(i);
    if constexpr (kNarrow) {
      alignas(64) Value p[kBlockNumel];
      alignas(64) Value g[kBlockNumel];
      alignas(64) Value b[kBuffers][kNarrowBuffers ? kBlockNumel : 1];
      widen<Convert>(part.param, p, size);
      widen<Convert>(part.grad, g, size);
      for (int k = 0; kNarrowBuffers && k < kUsed; ++k) {
        widen<Convert>(part.buffers[k], b[k], size);
      }
      if (grad_scale != nullptr) {
        for (int64_t j = 0; j < size; ++j) {
          g[j] = g[j] / scale;
        }
        narrow<Convert>(g, part.grad, size);
      }
      if constexpr (kNarrowBuffers) {
        Arrays<Value, const Value, Value, kBuffers> wide{p, g, {}};
        for (int k = 0; k < kBuffers; ++k) {
          wide.buffers[k] = b[k];
        }
        update_part<kTorchRoots, Variant, Arith, Formula>(wide, size, scalars, rounding);
      } else {
        update_part<kTorchRoots, Variant, Arith, Formula>(
            Arrays<Value, const Value, typename Types::Buffer, kBuffers>{p, g, part.buffers}, size, scalars,
            rounding.at(i));
      }
      narrow<Convert>(p, part.param, size);
      for (int k = 0; kNarrowBuffers && k < kUsed; ++k) {
        narrow<Convert>(b[k], part.buffers[k], size);
      }
    } else {
      for (int64_t j = 0; grad_scale != nullptr && j < size; ++j) {
        part.grad[j] = part.grad[j] / scale;
      }
      update_part<kTorchRoots, Variant, Arith, Formula>(
          Arrays<T, const T, typename Types::Buffer, kBuffers>{part.param, part.grad, part.buffers}, size, scalars,
          rounding.at(i));
    }
  }
}

// One entry per instruction set: the same code, inlined whole and compiled for it.
struct BaselineTarget {
#ifdef TORCH_FREEZE_X86
  using Arith = SeparateArith;
#else
  using Arith = FusedArith;
#endif
  template <class Variant, bool kTorchRoots, class Formula, class Types, class Rounding>
  static void run(const Span<Formula, Types>& span, Rounding rounding) {
    update_span<Variant, Arith, Baseline, kTorchRoots>(span, rounding);
  }
};

#ifdef TORCH_FREEZE_X86
struct Avx2Target {
  template <class Variant, bool kTorchRoots, class Formula, class Types, class Rounding>
  __attribute__((target("avx2,fma,f16c"))) static void run(const Span<Formula, Types>& span, Rounding rounding) {
    update_span<Variant, FusedArith, F16c, kTorchRoots>(span, rounding);
  }
};
struct Avx512Target {
  template <class Variant, bool kTorchRoots, class Formula, class Types, class Rounding>
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512"))) static void
  run(const Span<Formula, Types>& span, Rounding rounding) {
    update_span<Variant, FusedArith, F16c, kTorchRoots>(span, rounding);
  }
};
#endif

template <class Target, class Formula, class Types>
void step(const UpdateBatch<Formula>& batch) {
  using T = typename Types::Param;
  using Buffer = typename Types::Buffer;
  using Rounding = std::conditional_t<Types::kStochastic, StochasticRounding, NearestRounding>;
  constexpr bool kTorchRoots = Formula::kRoots && !Types::kStochastic;
  for_each_span(batch.updates, batch.count, batch.numel, [&batch] {
    // What the last span used. Most spans use the same, because neighbours share their group.
    using Run = void (*)(const Span<Formula, Types>&, Rounding);
    struct NoRoots {};
    using Roots = std::conditional_t<kTorchRoots, TorchSqrtThread, NoRoots>;
    return [roots = Roots{}, &batch, run = Run{}, scalars = AllScalars<Formula, typename Types::Value>{},
            group = int32_t{-1}, fresh = false, count = 0.0,
            last = LastCounted<Formula>{}](const auto& update, int64_t begin, int64_t end) mutable {
      const auto& hyper = batch.groups[update.group];
      if (update.group != group || update.fresh != fresh) {
        group = update.group;
        fresh = update.fresh;
        scalars.group = Formula::template scalars<typename Types::Value>(hyper);
        if constexpr (!Formula::State::kCounts) {
          scalars.tensor = Formula::tensor_scalars(scalars.group, hyper.lr.number, fresh);
        }
        count = 0;
        Formula::with_variant(Formula::variant_bits(hyper), [&](auto variant) {
          using Variant = decltype(variant);
          run = &Target::template run<Variant, false, Formula, Types, Rounding>;
          if constexpr (kTorchRoots) {
            if (Formula::takes_torch_roots(hyper)) {
              run = &Target::template run<Variant, true, Formula, Types, Rounding>;
            }
          }
        });
      }
      if constexpr (Formula::State::kCounts) {
        const double now = fresh ? 1 : 1 + static_cast<double>(*update.count);
        if (now != count) {
          count = now;
          scalars.tensor =
              Formula::tensor_scalars(scalars.group, hyper.lr.number, last.of(Formula::counting(hyper), count));
        }
      }
      Span<Formula, Types> span{
          {static_cast<T*>(update.param), static_cast<T*>(update.grad), {}},
          end - begin,
          scalars,
          batch.grad_scale};
      for (int k = 0; k < Formula::kBuffers; ++k) {
        span.arrays.buffers[k] = static_cast<Buffer*>(update.buffer[k]);
      }
      span.arrays = span.arrays.at(begin);
      for (auto* const buffer : span.arrays.buffers) {
        if (fresh && buffer != nullptr) {
          std::memset(static_cast<void*>(buffer), 0, static_cast<size_t>(span.numel) * sizeof(Buffer));
        }
      }
      run(span, Rounding::of(hyper.rounding_seed, update.index, begin));
    };
  });
}

template <class Formula, class Types>
void step_on_this_machine(const UpdateBatch<Formula>& batch) {
#ifdef TORCH_FREEZE_X86
  // Torch's own choice, not the processor's: with ATEN_CPU_CAPABILITY=default stock has no fused multiply-add.
  static const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") {
    return step<Avx512Target, Formula, Types>(batch);
  }
  if (capability == "AVX2") {
    return step<Avx2Target, Formula, Types>(batch);
  }
#endif
  step<BaselineTarget, Formula, Types>(batch);
}

}  // namespace cpu

template <class Formula>
void launch_cpu(const UpdateBatch<Formula>& batch) {
  if (batch.found_inf != nullptr && *batch.found_inf != 0) {
    return;
  }
  const bool known = with_dtypes(batch.kind, [&](auto types) {
    using Types = decltype(types);
    if constexpr (Types::kOnCpu) {
      cpu::step_on_this_machine<Formula, Types>(batch);
    } else {
      TORCH_CHECK_NOT_IMPLEMENTED(false, Formula::kName, " on ", no_kernel_for(batch.kind));
    }
  });
  TORCH_CHECK_NOT_IMPLEMENTED(known, Formula::kName, " on ", no_kernel_for(batch.kind));
}

}  // namespace torch_freeze
