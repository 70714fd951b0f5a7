// The SGD update of one element: written once, for every backend, vector body and tail alike.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels/host_device.h"

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
  uint64_t rounding_seed = 0;  // another one for every group and step; where momentum is rounded stochastically
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

// Stochastic rounding of momentum to bfloat16. Added to an fp32 value, sixteen random bits carry into the bits
// that bfloat16 keeps with the probability of what is cut off then, so that the expected result is the value
// itself: to either neighbour, never past it, and what bfloat16 holds exactly (zeros, infinities) stays. Between
// the largest finite bfloat16 and 2^128 the upper neighbour is infinity, as it is for rounding to nearest.
//
// The bits are a function of seed, parameter and element alone: nothing is stored, and no order of threads,
// blocks or instructions shows.

// Stafford's thirteenth variant of MurmurHash3's finaliser, as in Java's SplittableRandom
// (doi 10.1145/2660193.2660195).
TORCH_FREEZE_INLINE uint64_t mix_bits(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// What the bits of one tensor's elements start from, and what they go on by.
struct RoundingKey {
  uint32_t start;
  uint32_t step;  // odd, so that 2^32 elements differ
};

// The seed is mixed before the index comes in: else seeds an odd constant apart would share their tensors' keys.
TORCH_FREEZE_INLINE RoundingKey rounding_key(uint64_t seed, uint32_t index) {
  constexpr uint64_t kGolden = 0x9e3779b97f4a7c15u;
  const uint64_t key = mix_bits(mix_bits(seed + kGolden) + (index + uint64_t{1}) * kGolden);
  return {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32) | 1u};
}

// Sixteen bits for the element at `high` * 2^32 + `low` in its tensor's memory. Two rounds of a shift and of
// x (2x + 1), which permutes the 32-bit numbers; a multiplication by a constant, as cheap, lets neighbours differ
// by the same amount again and again.
TORCH_FREEZE_INLINE uint32_t rounding_bits(const RoundingKey& key, uint32_t low, uint32_t high) {
  uint32_t x = key.start + low * key.step;
  x ^= x >> 16;
  x *= 2 * x + 1;
  x += high * 0x9e3779b9u;
  x ^= x >> 15;
  x *= 2 * x + 1;
  return x >> 16;
}

// The bits of `value` rounded to bfloat16 by sixteen random bits; every NaN becomes the quiet one.
TORCH_FREEZE_INLINE uint32_t round_to_bfloat16(float value, uint32_t random) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return value != value ? 0x7fc0u : (bits + random) >> 16;
}

}  // namespace torch_freeze
