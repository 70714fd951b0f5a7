// What a formula has unless it says otherwise: see kernels/tile_formula.h.
#pragma once

#include <cstdint>

#include "core/tensor_update.h"
#include "kernels/host_device.h"

namespace torch_freeze {

template <class State_>
struct FormulaBase {
  using State = State_;
  static constexpr int kBuffers = State::kBuffers;
  static constexpr bool kRoots = false;

  // A single variant, which uses all buffers.
  struct Variant {
    static constexpr uint8_t kBits = 0;
  };
  static uint8_t variant_bits(const GroupOptions&) { return Variant::kBits; }
  static constexpr TORCH_FREEZE_INLINE int buffers_used(uint8_t) { return kBuffers; }
  template <class Run>
  static TORCH_FREEZE_INLINE void with_variant(uint8_t, Run&& run) {
    run(Variant{});
  }
};

// What the last number of updates gave, on the host. As a rule all tensors have the same, also in groups that
// differ otherwise, and the powers behind it cost as much as a small tensor. Empty where nothing is counted.
template <class Formula, bool kCounts = Formula::State::kCounts>
struct LastCounted {};
template <class Formula>
struct LastCounted<Formula, true> {
  typename Formula::Counting counting{};
  typename Formula::Counted counted{};
  double count = 0;

  const typename Formula::Counted& of(const typename Formula::Counting& wanted, double now) {
    if (now != count || !(wanted == counting)) {
      counting = wanted;
      count = now;
      counted = Formula::counted(wanted, now);
    }
    return counted;
  }
};

}  // namespace torch_freeze
