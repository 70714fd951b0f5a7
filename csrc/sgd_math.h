// The SGD update of one element: written once, for every backend, vector body and tail alike.
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace torch_freeze {

// The hyper-parameters of one param group, as the user wrote them.
struct SgdGroup {
  double lr = 0;
  double momentum = 0;
  double undamped = 1;  // 1 - dampening
  double weight_decay = 0;
  // A learning rate that lives on the tensors' own device (one float, or one double where
  // `device_lr_is_double`) and is read there, so that a step captured in a CUDA graph follows it. Null: `lr`.
  const void* device_lr = nullptr;
  bool device_lr_is_double = false;
  bool nesterov = false;
  bool maximize = false;
};

// What the formula multiplies by: formed in double, rounded once to the type of the arithmetic.
template <class T>
struct SgdScalars {
  T neg_lr;
  T momentum;
  T undamped;
  T weight_decay;
  T sign;  // -1 to maximize, else 1: an exact product
};

template <class T>
TORCH_FREEZE_INLINE SgdScalars<T> sgd_scalars(const SgdGroup& group) {
  return {
      static_cast<T>(-group.lr), static_cast<T>(group.momentum), static_cast<T>(group.undamped),
      static_cast<T>(group.weight_decay), static_cast<T>(group.maximize ? -1.0 : 1.0)};
}

enum class MomentumUse : uint8_t {
  kNone,        // no buffer
  kFresh,       // the buffer holds nothing yet and starts as the undamped gradient
  kAccumulate,  // the buffer holds the past
};

// A branch of the formula, fixed for a whole tensor and so hoisted out of every loop.
template <bool kDecay_, MomentumUse kMomentum_, bool kNesterov_>
struct SgdVariant {
  static constexpr bool kDecay = kDecay_;
  static constexpr MomentumUse kMomentum = kMomentum_;
  static constexpr bool kNesterov = kNesterov_;
};

// `Arith::fma(a, b, c)` is a * b + c with the roundings of the backend that stock would use.
template <class Variant, class Arith, class T>
TORCH_FREEZE_INLINE void sgd_element(T& param, T& momentum, T grad, const SgdScalars<T>& s) {
  T d = s.sign * grad;
  if constexpr (Variant::kDecay) {
    d = Arith::fma(s.weight_decay, param, d);
  }
  if constexpr (Variant::kMomentum == MomentumUse::kFresh) {
    momentum = d;
  } else if constexpr (Variant::kMomentum == MomentumUse::kAccumulate) {
    momentum = Arith::fma(s.undamped, d, s.momentum * momentum);
  }
  if constexpr (Variant::kMomentum != MomentumUse::kNone) {
    d = Variant::kNesterov ? Arith::fma(s.momentum, momentum, d) : momentum;
  }
  param = Arith::fma(s.neg_lr, d, param);
}

// Calls `run(SgdVariant<…>{})` for the branch that one tensor of `group` takes.
template <class Run>
TORCH_FREEZE_INLINE void with_sgd_variant(const SgdGroup& group, bool fresh, Run&& run) {
  const auto pick_momentum = [&](auto decay) {
    constexpr bool kDecay = decltype(decay)::kDecay;
    if (group.momentum == 0) {
      run(SgdVariant<kDecay, MomentumUse::kNone, false>{});
    } else if (fresh && group.nesterov) {
      run(SgdVariant<kDecay, MomentumUse::kFresh, true>{});
    } else if (fresh) {
      run(SgdVariant<kDecay, MomentumUse::kFresh, false>{});
    } else if (group.nesterov) {
      run(SgdVariant<kDecay, MomentumUse::kAccumulate, true>{});
    } else {
      run(SgdVariant<kDecay, MomentumUse::kAccumulate, false>{});
    }
  };
  if (group.weight_decay != 0) {
    pick_momentum(SgdVariant<true, MomentumUse::kNone, false>{});
  } else {
    pick_momentum(SgdVariant<false, MomentumUse::kNone, false>{});
  }
}

}  // namespace torch_freeze
