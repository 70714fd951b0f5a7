// Adam and AdamW: their hyper-parameters, and the update of one element.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/tensor_update.h"
#include "kernels/formula_base.h"
#include "kernels/host_device.h"

namespace torch_freeze {

// The hyper-parameters of one param group, as the user wrote them.
struct AdamGroup : GroupOptions {
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;
  double weight_decay = 0;
  bool amsgrad = false;
  bool maximize = false;
  bool decoupled = false;  // AdamW's weight decay
  bool fused = false;      // as torch's fused implementation, with the processor's own square roots
  // A tensor or a NumPy scalar of this type computes in it, also with numbers of Python's.
  bool step_in_float = false;   // the learning rate by the correction of exp_avg
  bool decay_in_float = false;  // the learning rate by a decoupled weight decay
};

// A branch of the formula, fixed for a whole tensor and so hoisted out of every loop.
template <uint8_t kBits_>
struct AdamVariant {
  static constexpr uint8_t kBits = kBits_;
  static constexpr bool kDecay = (kBits & 1) != 0;
  static constexpr bool kDecoupled = (kBits & 2) != 0;
  static constexpr bool kAmsgrad = (kBits & 4) != 0;
};

// Its state is exp_avg, exp_avg_sq, max_exp_avg_sq and the count.
struct AdamFormula : FormulaBase<StateLayout<3, true>> {
  static constexpr const char* kName = "adam step";
  static constexpr bool kRoots = true;
  using Group = AdamGroup;

  // What the formula multiplies by: formed in double, rounded once to the type of the arithmetic.
  template <class T>
  struct Scalars {
    T weight1;    // of the gradient in exp_avg: 1 - beta1, or -beta1 where that is the smaller
    bool large1;  // it is -beta1
    bool step_in_float;
    bool decay_in_float;
    T beta2;
    T weight2;  // of the squared gradient in exp_avg_sq: 1 - beta2
    T eps;
    T weight_decay;
    T sign;        // -1 to maximize, else 1: an exact product
    double decay;  // the weight decay once more, to be multiplied by the learning rate
  };
  template <class T>
  static Scalars<T> scalars(const Group& group) {
    const T weight1 = static_cast<T>(1 - group.beta1);
    const bool large = !(std::abs(weight1) < T(0.5));
    return {
        large ? weight1 - T(1) : weight1,
        large,
        group.step_in_float,
        group.decay_in_float,
        static_cast<T>(group.beta2),
        static_cast<T>(1 - group.beta2),
        static_cast<T>(group.eps),
        static_cast<T>(group.weight_decay),
        static_cast<T>(group.maximize ? -1.0 : 1.0),
        group.weight_decay};
  }

  // What the number of a parameter's updates gives, this one included.
  struct Counting {
    double beta1;
    double beta2;
    bool operator==(const Counting& other) const { return beta1 == other.beta1 && beta2 == other.beta2; }
  };
  static Counting counting(const Group& group) { return {group.beta1, group.beta2}; }
  struct Counted {
    double bias1;       // 1 - beta1^count
    double root_bias2;  // sqrt(1 - beta2^count)
  };
  static TORCH_FREEZE_INLINE Counted counted(const Counting& group, double count) {
    return {1 - pow(group.beta1, count), pow(1 - pow(group.beta2, count), 0.5)};
  }

  // Those that differ from one tensor of a group to another, and those with the learning rate.
  template <class T>
  struct TensorScalars {
    T neg_step;
    T root_bias2;
    T inverse_root_bias2;
    T kept;  // of the parameter, by decoupled decay
  };
  template <class T>
  static TORCH_FREEZE_INLINE TensorScalars<T> tensor_scalars(
      const Scalars<T>& s, double lr, const Counted& counted) {
    // Rounding what double computes of floats gives what float computes.
    const auto rounded = [](bool in_float, double x) { return in_float ? static_cast<float>(x) : x; };
    const double step = rounded(s.step_in_float, lr / rounded(s.step_in_float, counted.bias1));
    const double decay =
        rounded(s.decay_in_float, rounded(s.decay_in_float, lr) * rounded(s.decay_in_float, s.decay));
    return {
        static_cast<T>(-step), static_cast<T>(counted.root_bias2), static_cast<T>(1 / counted.root_bias2),
        static_cast<T>(rounded(s.decay_in_float, 1 - decay))};
  }

  static bool takes_torch_roots(const Group& group) { return !group.fused; }
  static uint8_t variant_bits(const Group& group) {
    const bool decay = group.weight_decay != 0;
    return static_cast<uint8_t>((decay ? 1 : 0) | (decay && group.decoupled ? 2 : 0) | (group.amsgrad ? 4 : 0));
  }
  static constexpr TORCH_FREEZE_INLINE int buffers_used(uint8_t variant_bits) {
    return (variant_bits & 4) != 0 ? 3 : 2;
  }
  // Calls `run(AdamVariant<…>{})`.
  template <class Run>
  static TORCH_FREEZE_INLINE void with_variant(uint8_t variant_bits, Run&& run) {
    switch (variant_bits) {
      case 0:
        return run(AdamVariant<0>{});
      case 1:
        return run(AdamVariant<1>{});
      case 3:
        return run(AdamVariant<3>{});
      case 4:
        return run(AdamVariant<4>{});
      case 5:
        return run(AdamVariant<5>{});
      default:
        return run(AdamVariant<7>{});
    }
  }

  // The part before the square root, whose argument it returns. The parameter is not written, nor read but for an
  // L2 penalty, so that its memory is waited for in the other part, which computes longer.
  template <class Variant, class Arith, class T>
  static TORCH_FREEZE_INLINE T
  before_root(T param, T grad, T (&buffers)[kBuffers], const Scalars<T>& s, const TensorScalars<T>&) {
    T d = s.sign * grad;
    if constexpr (Variant::kDecay && !Variant::kDecoupled) {
      d = Arith::fma(s.weight_decay, param, d);
    }
    auto& [exp_avg, exp_avg_sq, max_exp_avg_sq] = buffers;
    exp_avg = Arith::fma(s.weight1, d - exp_avg, s.large1 ? d : exp_avg);
    exp_avg_sq = Arith::fma(s.weight2 * d, d, exp_avg_sq * s.beta2);
    if constexpr (Variant::kAmsgrad) {
      // Not std::max, so that NaN stays.
      max_exp_avg_sq =
          max_exp_avg_sq >= exp_avg_sq || max_exp_avg_sq != max_exp_avg_sq ? max_exp_avg_sq : exp_avg_sq;
      return max_exp_avg_sq;
    }
    return exp_avg_sq;
  }
  // A GPU multiplies where stock divides on the CPU: the registers of a second division would not fit.
  template <class Variant, class Arith, class T>
  static TORCH_FREEZE_INLINE void after_root(
      T& param, T exp_avg, T root, const Scalars<T>& s, const TensorScalars<T>& t) {
    const T corrected = Arith::kDividesTwice ? root / t.root_bias2 : root * t.inverse_root_bias2;
    const T kept = Variant::kDecoupled ? param * t.kept : param;
    param = kept + (t.neg_step * exp_avg) / (corrected + s.eps);
  }
  template <class Variant, class Arith, class T>
  static TORCH_FREEZE_INLINE void element(
      T& param, T grad, T (&buffers)[kBuffers], const Scalars<T>& s, const TensorScalars<T>& t) {
    const T squared = before_root<Variant, Arith>(param, grad, buffers, s, t);
    after_root<Variant, Arith>(param, buffers[0], Arith::sqrt(squared), s, t);
  }
};

using AdamBatch = UpdateBatch<AdamFormula>;

}  // namespace torch_freeze
