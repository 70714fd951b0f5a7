// SGD as a formula of the multi-tensor kernel. Host and device: the CUDA launch and its run on the CPU share it.
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "kernels/host_device.h"
#include "kernels/tiles.h"
#include "optim/sgd_math.h"
#include "core/tensor_update.h"

namespace torch_freeze {

// One rounding per fma whatever the compiler's flags, on either side.
struct KernelArith {
  static TORCH_FREEZE_INLINE float fma(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
    return __fmaf_rn(a, b, c);
#else
    return std::fma(a, b, c);
#endif
  }
  static TORCH_FREEZE_INLINE double fma(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
    return __fma_rn(a, b, c);
#else
    return std::fma(a, b, c);
#endif
  }
};

// A variant as a byte, to pass from the host, which picks it, to the kernel.
template <class Variant>
inline constexpr uint8_t kVariantId = static_cast<uint8_t>(
    static_cast<int>(Variant::kMomentum) * 4 + (Variant::kNesterov ? 2 : 0) + (Variant::kDecay ? 1 : 0));

TORCH_FREEZE_INLINE MomentumUse momentum_use(uint8_t variant_id) {
  return static_cast<MomentumUse>(variant_id / 4);
}

inline uint8_t sgd_variant_id(const SgdGroup& group, bool fresh) {
  uint8_t id = 0;
  with_sgd_variant(group, fresh, [&](auto variant) { id = kVariantId<decltype(variant)>; });
  return id;
}

namespace detail {

template <bool kDecay, class Run>
TORCH_FREEZE_INLINE void with_variant_of_decay(uint8_t id, Run&& run) {
  using None = SgdVariant<kDecay, MomentumUse::kNone, false>;
  using Fresh = SgdVariant<kDecay, MomentumUse::kFresh, false>;
  using FreshNesterov = SgdVariant<kDecay, MomentumUse::kFresh, true>;
  using Accumulate = SgdVariant<kDecay, MomentumUse::kAccumulate, false>;
  using AccumulateNesterov = SgdVariant<kDecay, MomentumUse::kAccumulate, true>;
  switch (id) {
    case kVariantId<None>:
      return run(None{});
    case kVariantId<Fresh>:
      return run(Fresh{});
    case kVariantId<FreshNesterov>:
      return run(FreshNesterov{});
    case kVariantId<Accumulate>:
      return run(Accumulate{});
    default:
      return run(AccumulateNesterov{});
  }
}

}  // namespace detail

template <class Run>
TORCH_FREEZE_INLINE void with_variant(uint8_t id, Run&& run) {
  if ((id & 1) != 0) {
    detail::with_variant_of_decay<true>(id, run);
  } else {
    detail::with_variant_of_decay<false>(id & ~1, run);
  }
}

// A scaler's scale is one unless its user chose otherwise, and dividing by one is multiplying by its inverse, to
// the last bit. (2^127 is left out: its inverse is subnormal.)
TORCH_FREEZE_INLINE bool is_power_of_two(float scale) {
  uint32_t bits;
  std::memcpy(&bits, &scale, sizeof(bits));
  return (bits & 0x807fffffu) == 0 && bits != 0 && bits < 0x7f000000u;
}

template <class Param, class Grad, class Momentum, bool kStochastic_ = false>
struct SgdFormula {
  using Elements = std::tuple<Param, Grad, Momentum>;
  using Value = std::conditional_t<std::is_same_v<Param, double>, double, float>;
  // The gradient alone: the others are written, and the next forward pass reads the parameter.
  template <int kArray>
  static constexpr bool kStreamed = kArray == 1;
  template <int kArray>
  static constexpr bool kRealigned = kArray == 1;

  struct Launch {
    const float* grad_scale;
    const float* found_inf;
  };

  struct Group {
    SgdScalars<Value> scalars;
    bool device_lr_is_double;
    const void* device_lr;
  };

  struct Nothing {};
  struct Rounded {
    RoundingKey rounding;
  };
  static constexpr bool kStochastic = kStochastic_;
  static_assert(!kStochastic || std::is_same_v<Momentum, c10::BFloat16>);
  using Tensor = std::conditional_t<kStochastic, Rounded, Nothing>;

  static Group group(const SgdGroup& group) {
    return {sgd_scalars<Value>(group), group.device_lr_is_double, group.device_lr};
  }

  static TORCH_FREEZE_INLINE bool skips(const Launch& launch) {
    return launch.found_inf != nullptr && *launch.found_inf != 0;
  }

  // The update of one tensor. Its branches are the same for all threads of a warp and taken once per vector, not
  // per element; taken any further out, each would repeat the loads and stores around it, in ten
  // kernels' worth of code. Division, with the registers of its special cases, stays out of the vector loop.
  struct Rule {
    const Group& group;  // left in constant memory, where they cost no registers
    const Tensor& tensor;
    Value neg_lr;
    Value grad_scale;  // its inverse, where that is as good
    bool scaled;
    bool simple;
    uint8_t variant_id;

    TORCH_FREEZE_INLINE Rule(const Launch& launch, const Group& group, const Tensor& tensor, uint8_t variant_id)
        : group(group),
          tensor(tensor),
          neg_lr(group.scalars.neg_lr),
          grad_scale(1),
          scaled(launch.grad_scale != nullptr),
          simple(true),
          variant_id(variant_id) {
      if (group.device_lr != nullptr) {
        const double lr = group.device_lr_is_double ? *static_cast<const double*>(group.device_lr)
                                                    : *static_cast<const float*>(group.device_lr);
        neg_lr = static_cast<Value>(-lr);
      }
      if (scaled) {
        const float scale = *launch.grad_scale;
        simple = is_power_of_two(scale);
        grad_scale = simple ? static_cast<Value>(1 / scale) : static_cast<Value>(scale);
      }
    }

    template <int kArray>
    TORCH_FREEZE_INLINE bool reads() const {
      return kArray != 2 || momentum_use(variant_id) == MomentumUse::kAccumulate;
    }
    template <int kArray>
    TORCH_FREEZE_INLINE bool writes() const {
      return kArray == 0 || (kArray == 1 ? scaled : momentum_use(variant_id) != MomentumUse::kNone);
    }
    template <int kCount>
    TORCH_FREEZE_INLINE void update_simple(Value (&values)[3][kCount], int64_t element, uint32_t stride) const {
      if (scaled) {
        TORCH_FREEZE_UNROLL
        for (int i = 0; i < kCount; ++i) {
          values[1][i] = values[1][i] * grad_scale;
        }
      }
      descend(values, element, stride);
    }
    template <int kCount>
    TORCH_FREEZE_INLINE void update(Value (&values)[3][kCount], int64_t element, uint32_t stride) const {
      if (simple) {
        update_simple(values, element, stride);
        return;
      }
      TORCH_FREEZE_UNROLL
      for (int i = 0; i < kCount; ++i) {
        values[1][i] = values[1][i] / grad_scale;
      }
      descend(values, element, stride);
    }

   private:
    template <int kCount>
    TORCH_FREEZE_INLINE void descend(
        Value (&values)[3][kCount], [[maybe_unused]] int64_t element, [[maybe_unused]] uint32_t stride) const {
      SgdScalars<Value> scalars = group.scalars;
      scalars.neg_lr = neg_lr;
      with_variant(variant_id, [&](auto variant) {
        TORCH_FREEZE_UNROLL
        for (int i = 0; i < kCount; ++i) {
          sgd_element<decltype(variant), KernelArith>(values[0][i], values[2][i], values[1][i], scalars);
        }
      });
      if constexpr (kStochastic) {
        // To a value that bfloat16 holds: the conversion on the way to memory then changes nothing.
        TORCH_FREEZE_UNROLL
        for (int i = 0; i < kCount; ++i) {
          const auto place = static_cast<uint64_t>(element) + static_cast<uint64_t>(i) * stride;
          const uint32_t random =
              rounding_bits(tensor.rounding, static_cast<uint32_t>(place), static_cast<uint32_t>(place >> 32));
          const uint32_t bits = round_to_bfloat16(values[2][i], random) << 16;
          std::memcpy(&values[2][i], &bits, sizeof(bits));
        }
      }
    }
  };
};

// A batch as the packing of tables reads it.
template <class Formula>
class SgdSource {
 public:
  explicit SgdSource(const UpdateBatch& batch) : batch_(batch) {}

  typename Formula::Launch launch() const { return {batch_.grad_scale, batch_.found_inf}; }
  int64_t count() const { return batch_.count; }
  int64_t group_count() const { return batch_.group_count; }
  int64_t numel(int64_t tensor) const { return batch_.updates[tensor].numel; }
  int64_t group_of(int64_t tensor) const { return batch_.updates[tensor].group; }
  typename Formula::Group group(int64_t index) const { return Formula::group(batch_.groups[index]); }
  template <class Row>
  void fill(int64_t tensor, Row& row) const {
    const TensorUpdate& update = batch_.updates[tensor];
    row.array[0] = update.param;
    row.array[1] = update.grad;
    row.array[2] = update.momentum;
    row.branch = sgd_variant_id(batch_.groups[update.group], update.fresh);
    if constexpr (Formula::kStochastic) {
      row.rounding = rounding_key(batch_.groups[update.group].rounding_seed, update.index);
    }
  }

 private:
  const UpdateBatch& batch_;
};

// Calls `run(SgdFormula<…>{})` for the batch's dtypes; false where there is no kernel for them.
template <class Run>
bool with_sgd_formula(const UpdateBatch& batch, Run&& run) {
  const auto is = [&](c10::ScalarType param, c10::ScalarType grad, c10::ScalarType momentum,
                      bool stochastic = false) {
    return batch.param_type == param && batch.grad_type == grad && batch.momentum_type == momentum &&
           batch.stochastic == stochastic;
  };
  using c10::kBFloat16, c10::kDouble, c10::kFloat, c10::kHalf;
  if (is(kFloat, kFloat, kFloat)) {
    run(SgdFormula<float, float, float>{});
  } else if (is(kBFloat16, kBFloat16, kBFloat16)) {
    run(SgdFormula<c10::BFloat16, c10::BFloat16, c10::BFloat16>{});
  } else if (is(kHalf, kHalf, kHalf)) {
    run(SgdFormula<c10::Half, c10::Half, c10::Half>{});
  } else if (is(kFloat, kBFloat16, kFloat)) {
    run(SgdFormula<float, c10::BFloat16, float>{});
  } else if (is(kFloat, kHalf, kFloat)) {
    run(SgdFormula<float, c10::Half, float>{});
  } else if (is(kDouble, kDouble, kDouble)) {
    run(SgdFormula<double, double, double>{});
  } else if (is(kFloat, kFloat, kBFloat16, true)) {
    run(SgdFormula<float, float, c10::BFloat16, true>{});
  } else if (is(kBFloat16, kBFloat16, kBFloat16, true)) {
    run(SgdFormula<c10::BFloat16, c10::BFloat16, c10::BFloat16, true>{});
  } else {
    return false;
  }
  return true;
}

}  // namespace torch_freeze
