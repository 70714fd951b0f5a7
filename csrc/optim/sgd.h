// SGD: its hyper-parameters, and the update of one element, written once for every backend.
#pragma once

#include <cstdint>

#include "core/tensor_update.h"
#include "kernels/formula_base.h"
#include "kernels/host_device.h"

namespace torch_freeze {

// The hyper-parameters of one param group, as the user wrote them.
struct SgdGroup : GroupOptions {
  double momentum = 0;
  double undamped = 1;  // 1 - dampening
  double weight_decay = 0;
  bool nesterov = false;
  bool maximize = false;
};

// A branch of the formula, fixed for a whole tensor and so hoisted out of every loop.
template <uint8_t kBits_>
struct SgdVariant {
  static constexpr uint8_t kBits = kBits_;
  static constexpr bool kDecay = (kBits & 1) != 0;
  static constexpr bool kMomentum = (kBits & 2) != 0;
  static constexpr bool kNesterov = (kBits & 4) != 0;
};

// Its state is the momentum buffer.
struct SgdFormula : FormulaBase<StateLayout<1, false>> {
  static constexpr const char* kName = "sgd step";
  using Group = SgdGroup;

  // What the formula multiplies by: formed in double, rounded once to the type of the arithmetic.
  template <class T>
  struct Scalars {
    T momentum;
    T undamped;
    T weight_decay;
    T sign;  // -1 to maximize, else 1: an exact product
  };
  template <class T>
  static Scalars<T> scalars(const Group& group) {
    return {
        static_cast<T>(group.momentum), static_cast<T>(group.undamped), static_cast<T>(group.weight_decay),
        static_cast<T>(group.maximize ? -1.0 : 1.0)};
  }

  // Those that differ from one tensor of a group to another, and those with the learning rate.
  template <class T>
  struct TensorScalars {
    T neg_lr;
    T kept;   // what the buffer's past is multiplied by,
    T added;  // and the gradient
  };
  // A buffer starts as the undamped gradient. It then counts as zero, and minus zero is what can be added to any
  // number, a zero of either sign included, and leaves its bits as they are.
  template <class T>
  static TORCH_FREEZE_INLINE TensorScalars<T> tensor_scalars(const Scalars<T>& s, double lr, bool fresh) {
    return {static_cast<T>(-lr), fresh ? T(-0.0) : s.momentum, fresh ? T(1) : s.undamped};
  }

  static uint8_t variant_bits(const Group& group) {
    const bool momentum = group.momentum != 0;
    return static_cast<uint8_t>(
        (group.weight_decay != 0 ? 1 : 0) | (momentum ? 2 : 0) | (momentum && group.nesterov ? 4 : 0));
  }
  static constexpr TORCH_FREEZE_INLINE int buffers_used(uint8_t variant_bits) {
    return (variant_bits & 2) != 0 ? 1 : 0;
  }
  // Calls `run(SgdVariant<…>{})`.
  template <class Run>
  static TORCH_FREEZE_INLINE void with_variant(uint8_t variant_bits, Run&& run) {
    switch (variant_bits) {
      case 0:
        return run(SgdVariant<0>{});
      case 1:
        return run(SgdVariant<1>{});
      case 2:
        return run(SgdVariant<2>{});
      case 3:
        return run(SgdVariant<3>{});
      case 6:
        return run(SgdVariant<6>{});
      default:
        return run(SgdVariant<7>{});
    }
  }

  // `Arith::fma(a, b, c)` is a * b + c with the roundings of the backend that stock would use.
  template <class Variant, class Arith, class T>
  static TORCH_FREEZE_INLINE void element(
      T& param, T grad, T (&buffers)[kBuffers], const Scalars<T>& s, const TensorScalars<T>& t) {
    T d = s.sign * grad;
    if constexpr (Variant::kDecay) {
      d = Arith::fma(s.weight_decay, param, d);
    }
    if constexpr (Variant::kMomentum) {
      T& momentum = buffers[0];
      momentum = Arith::fma(t.added, d, t.kept * momentum);
      d = Variant::kNesterov ? Arith::fma(s.momentum, momentum, d) : momentum;
    }
    param = Arith::fma(t.neg_lr, d, param);
  }
};

using SgdBatch = UpdateBatch<SgdFormula>;

}  // namespace torch_freeze
