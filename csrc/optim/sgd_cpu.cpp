// The SGD step on the CPU: one parallel region, vectorised for what torch itself picked on this machine.

#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <type_traits>

#include "kernels/launch_cpu.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define TORCH_FREEZE_X86 1
#include <immintrin.h>
#endif

namespace torch_freeze {
namespace {

// Stock rounds once where its vector type has a fused multiply-add, twice where it has none.
struct FusedArith {
  static TORCH_FREEZE_INLINE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
  static TORCH_FREEZE_INLINE double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
};
struct SeparateArith {
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

// How momentum is kept. As a rule in the parameter's type, as it is or through the blocks below.
struct NearestRounding {
  template <class T>
  using Momentum = T;
  static NearestRounding of(const UpdateBatch&, const TensorUpdate&, int64_t) { return {}; }
  TORCH_FREEZE_INLINE NearestRounding at(int64_t) const { return *this; }
  template <class T>
  TORCH_FREEZE_INLINE T load(T momentum) const {
    return momentum;
  }
  template <class T>
  TORCH_FREEZE_INLINE T store(T momentum, int64_t) const {
    return momentum;
  }
};

// So many elements at most are rounded at a time, beginning at a multiple of it: the upper half of their places is
// then the same.
constexpr int64_t kRunNumel = 64;
static_assert(kSplitNumel % kRunNumel == 0, "a thread's share begins with a run");

struct StochasticRounding {
  template <class T>
  using Momentum = c10::BFloat16;
  RoundingKey key;
  int64_t first;  // the place of element 0

  static StochasticRounding of(const UpdateBatch& batch, const TensorUpdate& update, int64_t first) {
    return {rounding_key(batch.groups[update.group].rounding_seed, update.index), first};
  }
  TORCH_FREEZE_INLINE StochasticRounding at(int64_t element) const { return {key, first + element}; }
  TORCH_FREEZE_INLINE float load(c10::BFloat16 momentum) const {
    const uint32_t bits = static_cast<uint32_t>(momentum.x) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }
  TORCH_FREEZE_INLINE c10::BFloat16 store(float momentum, int64_t element) const {
    const uint32_t low = static_cast<uint32_t>(first) + static_cast<uint32_t>(element);
    const uint32_t random = rounding_bits(key, low, static_cast<uint32_t>(first >> 32));
    return {static_cast<uint16_t>(round_to_bfloat16(momentum, random)), c10::BFloat16::from_bits()};
  }
};

template <class Variant, class Arith, class T, class Momentum, class Rounding>
TORCH_FREEZE_INLINE void update_run(
    T* __restrict param, const T* __restrict grad, Momentum* __restrict momentum, int64_t n,
    const SgdScalars<T>& s, Rounding rounding) {
  for (int64_t i = 0; i < n; ++i) {
    T p = param[i];
    T m = Variant::kMomentum == MomentumUse::kAccumulate ? rounding.load(momentum[i]) : T(0);
    sgd_element<Variant, Arith>(p, m, grad[i], s);
    if constexpr (Variant::kMomentum != MomentumUse::kNone) {
      momentum[i] = rounding.store(m, i);
    }
    param[i] = p;
  }
}

template <class Variant, class Arith, class T, class Momentum, class Rounding>
TORCH_FREEZE_INLINE void update_block(
    T* param, const T* grad, Momentum* momentum, int64_t n, const SgdScalars<T>& scalars, Rounding rounding) {
  const SgdScalars<T> s = scalars;
  constexpr auto kStride = kStrideBytes / static_cast<int64_t>(sizeof(T));
  constexpr bool kNearest = std::is_same_v<Rounding, NearestRounding>;
  static_assert(kNearest || kStride == kRunNumel);
  const bool ahead = n >= kPrefetchNumel;
  if (ahead || !kNearest) {
    for (; n >= kStride; n -= kStride) {
      if (ahead) {
        prefetch_stride(param);
        prefetch_stride(grad);
      }
      update_run<Variant, Arith>(param, grad, momentum, kStride, s, rounding);
      param += kStride;
      grad += kStride;
      if constexpr (Variant::kMomentum != MomentumUse::kNone) {
        if (ahead) {
          prefetch_stride(momentum);
        }
        momentum += kStride;
      }
      rounding = rounding.at(kStride);
    }
  }
  update_run<Variant, Arith>(param, grad, momentum, n, s, rounding);
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

// Narrow types pass through this many fp32 elements at a time, and gradients are unscaled so: all in L1.
constexpr int64_t kBlockNumel = 512;

// The type of the arithmetic on elements of type T.
template <class T>
using AccOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <class T, class Rounding>
using MomentumOf = typename Rounding::template Momentum<T>;

template <class Variant, class Arith, class Convert, class T, class Rounding>
TORCH_FREEZE_INLINE void update_span(
    T* param, T* grad, MomentumOf<T, Rounding>* momentum, int64_t n, const SgdScalars<AccOf<T>>& scalars,
    const float* grad_scale, Rounding rounding) {
  using Acc = AccOf<T>;
  constexpr bool kNarrow = !std::is_same_v<T, Acc>;
  constexpr bool kNarrowMomentum = kNarrow && std::is_same_v<Rounding, NearestRounding>;
  constexpr bool kHasMomentum = Variant::kMomentum != MomentumUse::kNone;
  if constexpr (!kNarrow) {
    if (grad_scale == nullptr) {
      update_block<Variant, Arith>(param, grad, momentum, n, scalars, rounding);
      return;
    }
  }
  const Acc scale = grad_scale == nullptr ? Acc(1) : static_cast<Acc>(*grad_scale);
  for (int64_t i = 0; i < n; i += kBlockNumel) {
    const int64_t size = n - i < kBlockNumel ? n - i : kBlockNumel;
    if constexpr (kNarrow) {
      alignas(64) Acc p[kBlockNumel];
      alignas(64) Acc g[kBlockNumel];
      alignas(64) Acc m[kNarrowMomentum ? kBlockNumel : 1];
      widen<Convert>(param + i, p, size);
      widen<Convert>(grad + i, g, size);
      if constexpr (kNarrowMomentum && Variant::kMomentum == MomentumUse::kAccumulate) {
        widen<Convert>(momentum + i, m, size);
      } else if constexpr (kNarrowMomentum && kHasMomentum) {
        std::fill_n(m, size, Acc(0));
      }
      if (grad_scale != nullptr) {
        for (int64_t j = 0; j < size; ++j) {
          g[j] = g[j] / scale;
        }
        narrow<Convert>(g, grad + i, size);
      }
      if constexpr (kNarrowMomentum) {
        update_block<Variant, Arith, Acc>(p, g, m, size, scalars, rounding);
      } else {
        update_block<Variant, Arith, Acc>(
            p, g, kHasMomentum ? momentum + i : nullptr, size, scalars, rounding.at(i));
      }
      narrow<Convert>(p, param + i, size);
      if constexpr (kNarrowMomentum && kHasMomentum) {
        narrow<Convert>(m, momentum + i, size);
      }
    } else {
      for (int64_t j = i; j < i + size; ++j) {
        grad[j] = grad[j] / scale;
      }
      update_block<Variant, Arith>(
          param + i, grad + i, kHasMomentum ? momentum + i : nullptr, size, scalars, rounding.at(i));
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
  template <class Variant, class T, class Rounding>
  static void run(
      T* p, T* g, MomentumOf<T, Rounding>* m, int64_t n, const SgdScalars<AccOf<T>>& scalars,
      const float* grad_scale, Rounding rounding) {
    update_span<Variant, Arith, Baseline>(p, g, m, n, scalars, grad_scale, rounding);
  }
};

#ifdef TORCH_FREEZE_X86
struct Avx2Target {
  template <class Variant, class T, class Rounding>
  __attribute__((target("avx2,fma,f16c"))) static void run(
      T* p, T* g, MomentumOf<T, Rounding>* m, int64_t n, const SgdScalars<AccOf<T>>& scalars,
      const float* grad_scale, Rounding rounding) {
    update_span<Variant, FusedArith, F16c>(p, g, m, n, scalars, grad_scale, rounding);
  }
};
struct Avx512Target {
  template <class Variant, class T, class Rounding>
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512"))) static void
  run(T* p, T* g, MomentumOf<T, Rounding>* m, int64_t n, const SgdScalars<AccOf<T>>& scalars,
      const float* grad_scale, Rounding rounding) {
    update_span<Variant, FusedArith, F16c>(p, g, m, n, scalars, grad_scale, rounding);
  }
};
#endif

template <class Target, class T, class Rounding>
void step(const UpdateBatch& batch) {
  for_each_span(batch.updates, batch.count, batch.numel, [&batch] {
    // What the last span used, for most spans take the same: neighbours share their group.
    using Momentum = MomentumOf<T, Rounding>;
    using Run = void (*)(T*, T*, Momentum*, int64_t, const SgdScalars<AccOf<T>>&, const float*, Rounding);
    return [&batch, run = Run{}, scalars = SgdScalars<AccOf<T>>{}, group = int32_t{-1}, fresh = false](
               const TensorUpdate& update, int64_t begin, int64_t end) mutable {
      if (update.group != group || update.fresh != fresh) {
        group = update.group;
        fresh = update.fresh;
        scalars = sgd_scalars<AccOf<T>>(batch.groups[group]);
        with_sgd_variant(batch.groups[group], fresh, [&](auto variant) {
          run = &Target::template run<decltype(variant), T, Rounding>;
        });
      }
      auto* const momentum = static_cast<Momentum*>(update.momentum);
      run(static_cast<T*>(update.param) + begin, static_cast<T*>(update.grad) + begin,
          momentum == nullptr ? nullptr : momentum + begin, end - begin, scalars, batch.grad_scale,
          Rounding::of(batch, update, begin));
    };
  });
}

template <class T, class Rounding>
void step_on_this_machine(const UpdateBatch& batch) {
#ifdef TORCH_FREEZE_X86
  // Torch's own choice, not the processor's: with ATEN_CPU_CAPABILITY=default stock has no fused multiply-add.
  static const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") {
    return step<Avx512Target, T, Rounding>(batch);
  }
  if (capability == "AVX2") {
    return step<Avx2Target, T, Rounding>(batch);
  }
#endif
  step<BaselineTarget, T, Rounding>(batch);
}

}  // namespace

void sgd_step_cpu(const UpdateBatch& batch) {
  if (batch.found_inf != nullptr && *batch.found_inf != 0) {
    return;
  }
  const auto is = [&](c10::ScalarType type, c10::ScalarType momentum, bool stochastic = false) {
    return batch.param_type == type && batch.grad_type == type && batch.momentum_type == momentum &&
           batch.stochastic == stochastic;
  };
  using c10::kBFloat16, c10::kDouble, c10::kFloat, c10::kHalf;
  if (is(kFloat, kFloat)) {
    return step_on_this_machine<float, NearestRounding>(batch);
  }
  if (is(kDouble, kDouble)) {
    return step_on_this_machine<double, NearestRounding>(batch);
  }
  if (is(kBFloat16, kBFloat16)) {
    return step_on_this_machine<c10::BFloat16, NearestRounding>(batch);
  }
  if (is(kHalf, kHalf)) {
    return step_on_this_machine<c10::Half, NearestRounding>(batch);
  }
  if (is(kFloat, kBFloat16, true)) {
    return step_on_this_machine<float, StochasticRounding>(batch);
  }
  if (is(kBFloat16, kBFloat16, true)) {
    return step_on_this_machine<c10::BFloat16, StochasticRounding>(batch);
  }
  TORCH_CHECK_NOT_IMPLEMENTED(
      false, "sgd step on ", batch.device, ": no kernel for parameters of ", batch.param_type,
      " with gradients of ", batch.grad_type, " and momentum of ", batch.momentum_type,
      batch.stochastic ? ", rounded stochastically" : "");
}

}  // namespace torch_freeze
