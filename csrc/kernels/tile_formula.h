// An optimizer's formula as one of the tiles. Host and device: the CUDA launch and its run on the CPU share it.
//
// A Formula is a class with
//   kName, kBuffers            for error messages; how many arrays there are beside parameter and gradient
//   Group                      the hyper-parameters of one param group, `lr` and `rounding_seed` among them
//   State                      a StateLayout: how many buffers, and whether updates are counted
//   Scalars<T>, scalars<T>(group)           what it multiplies by, formed once for each group
//   TensorScalars<T>, tensor_scalars(scalars, lr, fresh)
//                              those that differ from one tensor to another; `fresh`: the buffers count as zero.
//                              Where updates are counted, their last argument is instead a
//   Counted, counted(counting, count)       what the number of updates gives, from the group's
//   Counting, counting(group)               comparable by ==
//   kRoots                     whether element() has a square root. Where takes_torch_roots(group), the CPU lets
//                              torch's library take those of a whole block and calls before_root(), which
//                              returns what to take it of, and after_root()
//   variant_bits(group), buffers_used(bits), with_variant(bits, run)
//                              its branches, the same for a whole tensor
//   element<Variant, Arith>(param, grad, buffers, scalars, tensor_scalars)
//                              the update of one element
// kernels/launch_cpu.h takes the same, and kernels/formula_base.h has what most formulas have in common.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "core/dtypes.h"
#include "core/tensor_update.h"
#include "kernels/formula_base.h"
#include "kernels/host_device.h"
#include "kernels/stochastic_rounding.h"
#include "kernels/tiles.h"

namespace torch_freeze {

// One rounding per fma whatever the compiler's flags, on either side.
struct KernelArith {
  static constexpr bool kDividesTwice = false;
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
  static TORCH_FREEZE_INLINE float sqrt(float x) {
#if defined(__CUDA_ARCH__)
    return __fsqrt_rn(x);
#else
    return std::sqrt(x);
#endif
  }
  static TORCH_FREEZE_INLINE double sqrt(double x) {
#if defined(__CUDA_ARCH__)
    return __dsqrt_rn(x);
#else
    return std::sqrt(x);
#endif
  }
};

// A scaler's scale is one unless its user chose otherwise, and dividing by one is multiplying by its inverse, to
// the last bit. (2^127 is left out: its inverse is subnormal.)
TORCH_FREEZE_INLINE bool is_power_of_two(float scale) {
  uint32_t bits;
  std::memcpy(&bits, &scale, sizeof(bits));
  return (bits & 0x807fffffu) == 0 && bits != 0 && bits < 0x7f000000u;
}

// Whether a GradScaler found gradients that are not finite.
TORCH_FREEZE_INLINE bool has_overflowed(const float* found_inf) { return found_inf != nullptr && *found_inf != 0; }

namespace detail {

// What the count of a tensor's updates gives: from the host, or in the memory of the device.
template <class Formula, bool kCounts>
struct CountedOrNot {};
template <class Formula>
struct CountedOrNot<Formula, true> {
  union {
    typename Formula::Counted counted;
    const typename Formula::Counted* counted_on_device;
  };
};
template <bool kStochastic>
struct RoundingOrNot {};
template <>
struct RoundingOrNot<true> {
  RoundingKey rounding;
};
template <class Formula, bool kStochastic>
struct TensorBrings : CountedOrNot<Formula, Formula::State::kCounts>, RoundingOrNot<kStochastic> {};

template <class Types, class Buffers>
struct ElementsOf;
template <class Types, int... kBuffer>
struct ElementsOf<Types, std::integer_sequence<int, kBuffer...>> {
  template <int>
  using Buffer = typename Types::Buffer;
  using type = std::tuple<typename Types::Param, typename Types::Grad, Buffer<kBuffer>...>;
};

}  // namespace detail

// The arrays are the parameter, its gradient and the buffers, in this order.
template <class Formula, class Types>
struct TileFormula {
  static constexpr int kBuffers = Formula::kBuffers;
  static constexpr int kArrays = 2 + kBuffers;
  static constexpr bool kStochastic = Types::kStochastic;
  using Elements = typename detail::ElementsOf<Types, std::make_integer_sequence<int, kBuffers>>::type;
  using Value = typename Types::Value;
  using Scalars = typename Formula::template Scalars<Value>;
  using TensorScalars = typename Formula::template TensorScalars<Value>;
  // The gradient alone: the others are written, and the next forward pass reads the parameter.
  template <int kArray>
  static constexpr bool kStreamed = kArray == 1;
  template <int kArray>
  static constexpr bool kRealigned = kArray == 1;
  // Beside the variant in a row's branch.
  static constexpr uint8_t kFresh = 0x80;
  static constexpr uint8_t kCountOnDevice = 0x40;

  struct Launch {
    const float* grad_scale;
    const float* found_inf;
  };

  struct Group {
    Scalars scalars;
    LearningRate lr;
  };

  using Tensor = detail::TensorBrings<Formula, kStochastic>;

  static TORCH_FREEZE_INLINE bool skips(const Launch& launch) { return has_overflowed(launch.found_inf); }

  // The update of one tensor. Its branches are the same for all threads of a warp and taken once per vector, not
  // per element; taken any further out, each would repeat the loads and stores around it, in as many kernels'
  // worth of code as there are variants. Division, with the registers of its special cases, stays out of the
  // vector loop.
  struct Rule {
    const Group& group;  // left in constant memory, where they cost no registers
    const Tensor& tensor;
    TensorScalars scalars;
    Value grad_scale;  // its inverse, where that is as good
    bool scaled;
    bool simple;
    uint8_t branch;

    TORCH_FREEZE_INLINE Rule(const Launch& launch, const Group& group, const Tensor& tensor, uint8_t branch)
        : group(group),
          tensor(tensor),
          scalars(Formula::tensor_scalars(group.scalars, rate(group.lr), history(tensor, branch))),
          grad_scale(1),
          scaled(launch.grad_scale != nullptr),
          simple(true),
          branch(branch) {
      if (scaled) {
        const float scale = *launch.grad_scale;
        simple = is_power_of_two(scale);
        grad_scale = simple ? static_cast<Value>(1 / scale) : static_cast<Value>(scale);
      }
    }

    static TORCH_FREEZE_INLINE double rate(const LearningRate& lr) {
      return lr.device == nullptr  ? lr.number
             : lr.device_is_double ? *static_cast<const double*>(lr.device)
                                   : *static_cast<const float*>(lr.device);
    }
    static TORCH_FREEZE_INLINE auto history(const Tensor& tensor, uint8_t branch) {
      if constexpr (Formula::State::kCounts) {
        return (branch & kCountOnDevice) != 0 ? *tensor.counted_on_device : tensor.counted;
      } else {
        return (branch & kFresh) != 0;
      }
    }

    TORCH_FREEZE_INLINE uint8_t variant_bits() const { return branch & ~(kFresh | kCountOnDevice); }
    template <int kArray>
    TORCH_FREEZE_INLINE bool reads() const {
      return kArray < 2 || ((branch & kFresh) == 0 && writes<kArray>());
    }
    template <int kArray>
    TORCH_FREEZE_INLINE bool writes() const {
      return kArray == 0 || (kArray == 1 ? scaled : kArray - 2 < Formula::buffers_used(variant_bits()));
    }
    template <int kCount>
    TORCH_FREEZE_INLINE void update_simple(
        Value (&values)[kArrays][kCount], int64_t element, uint32_t stride) const {
      if (scaled) {
        TORCH_FREEZE_UNROLL
        for (int i = 0; i < kCount; ++i) {
          values[1][i] = values[1][i] * grad_scale;
        }
      }
      descend(values, element, stride);
    }
    template <int kCount>
    TORCH_FREEZE_INLINE void update(Value (&values)[kArrays][kCount], int64_t element, uint32_t stride) const {
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
        Value (&values)[kArrays][kCount], [[maybe_unused]] int64_t element,
        [[maybe_unused]] uint32_t stride) const {
      const Scalars group_scalars = group.scalars;
      Formula::with_variant(variant_bits(), [&](auto variant) {
        TORCH_FREEZE_UNROLL
        for (int i = 0; i < kCount; ++i) {
          Value buffers[kBuffers];
          TORCH_FREEZE_UNROLL
          for (int k = 0; k < kBuffers; ++k) {
            buffers[k] = values[2 + k][i];
          }
          Formula::template element<decltype(variant), KernelArith>(
              values[0][i], values[1][i], buffers, group_scalars, scalars);
          TORCH_FREEZE_UNROLL
          for (int k = 0; k < kBuffers; ++k) {
            values[2 + k][i] = buffers[k];
          }
        }
      });
      if constexpr (kStochastic) {
        // To values that bfloat16 holds: the conversion on the way to memory then changes nothing.
        TORCH_FREEZE_UNROLL
        for (int k = 0; k < kBuffers; ++k) {
          const RoundingKey key = buffer_key(tensor.rounding, k);
          TORCH_FREEZE_UNROLL
          for (int i = 0; i < kCount; ++i) {
            const auto place = static_cast<uint64_t>(element) + static_cast<uint64_t>(i) * stride;
            const uint32_t random =
                rounding_bits(key, static_cast<uint32_t>(place), static_cast<uint32_t>(place >> 32));
            const uint32_t bits = round_to_bfloat16(values[2 + k][i], random) << 16;
            std::memcpy(&values[2 + k][i], &bits, sizeof(bits));
          }
        }
      }
    }
  };
};

// A batch as the packing of tables reads it.
template <class Formula, class Types>
class BatchSource {
 public:
  using Tiled = TileFormula<Formula, Types>;
  using Batch = UpdateBatch<Formula>;

  // `counted`: on the device, an element for each update; null where no count lies there.
  explicit BatchSource(const Batch& batch, const void* counted = nullptr) : batch_(batch), counted_(counted) {}

  typename Tiled::Launch launch() const { return {batch_.grad_scale, batch_.found_inf}; }
  int64_t count() const { return batch_.count; }
  int64_t group_count() const { return batch_.group_count; }
  int64_t numel(int64_t tensor) const { return batch_.updates[tensor].numel; }
  int64_t group_of(int64_t tensor) const { return batch_.updates[tensor].group; }
  typename Tiled::Group group(int64_t index) const {
    const auto& group = batch_.groups[index];
    return {Formula::template scalars<typename Tiled::Value>(group), group.lr};
  }
  template <class Row>
  void fill(int64_t tensor, Row& row) const {
    const auto& update = batch_.updates[tensor];
    const auto& group = batch_.groups[update.group];
    row.array[0] = update.param;
    row.array[1] = update.grad;
    for (int k = 0; k < Formula::kBuffers; ++k) {
      row.array[2 + k] = update.buffer[k];
    }
    row.branch = Formula::variant_bits(group) | (update.fresh != 0 ? Tiled::kFresh : 0);
    if constexpr (Types::kStochastic) {
      row.rounding = rounding_key(group.rounding_seed, update.index);
    }
    if constexpr (Formula::State::kCounts) {
      if (update.count_on_host) {
        const double count = update.fresh != 0 ? 1 : 1 + static_cast<double>(*update.count);
        row.counted = last_.of(Formula::counting(group), count);
      } else {
        row.counted_on_device = static_cast<const typename Formula::Counted*>(counted_) + tensor;
        row.branch |= Tiled::kCountOnDevice;
      }
    }
  }

 private:
  const Batch& batch_;
  const void* counted_;
  mutable LastCounted<Formula> last_;
};

// Counts the updates of tensors whose counts lie on the device, and forms what depends on them: a launch of its
// own before the update, since the tiles of a tensor are dealt to several blocks, none of which is the last.
template <class Formula>
struct CountFormula {
  static_assert(sizeof(typename Formula::Counted) == 2 * sizeof(double));
  using Elements = std::tuple<float, double, double>;  // the count, and the two numbers of a Counted
  using Value = double;
  template <int>
  static constexpr bool kStreamed = false;
  template <int>
  static constexpr bool kRealigned = false;
  struct Launch {
    const float* found_inf;
  };
  using Group = typename Formula::Counting;
  struct Tensor {};
  static TORCH_FREEZE_INLINE bool skips(const Launch& launch) { return has_overflowed(launch.found_inf); }

  struct Rule {
    const Group& group;
    bool fresh;
    static constexpr bool simple = false;

    TORCH_FREEZE_INLINE Rule(const Launch&, const Group& group, const Tensor&, uint8_t branch)
        : group(group), fresh(branch != 0) {}
    template <int kArray>
    TORCH_FREEZE_INLINE bool reads() const {
      return kArray == 0 && !fresh;
    }
    template <int kArray>
    TORCH_FREEZE_INLINE bool writes() const {
      return true;
    }
    template <int kCount>
    TORCH_FREEZE_INLINE void update(Value (&values)[3][kCount], int64_t, uint32_t) const {
      TORCH_FREEZE_UNROLL
      for (int i = 0; i < kCount; ++i) {
        values[0][i] = static_cast<float>(values[0][i]) + 1.0f;
        const auto counted = Formula::counted(group, values[0][i]);
        values[1][i] = counted.bias1;
        values[2][i] = counted.root_bias2;
      }
    }
    template <int kCount>
    TORCH_FREEZE_INLINE void update_simple(Value (&values)[3][kCount], int64_t element, uint32_t stride) const {
      update(values, element, stride);
    }
  };
};

template <class Formula>
class CountSource {
 public:
  using Tiled = CountFormula<Formula>;

  // `counted`: two doubles for each update.
  CountSource(const UpdateBatch<Formula>& batch, double* counted) : batch_(batch), counted_(counted) {}

  typename Tiled::Launch launch() const { return {batch_.found_inf}; }
  int64_t count() const { return batch_.count; }
  int64_t group_count() const { return batch_.group_count; }
  int64_t numel(int64_t tensor) const { return batch_.updates[tensor].count_on_host ? 0 : 1; }
  int64_t group_of(int64_t tensor) const { return batch_.updates[tensor].group; }
  typename Tiled::Group group(int64_t index) const { return Formula::counting(batch_.groups[index]); }
  template <class Row>
  void fill(int64_t tensor, Row& row) const {
    row.array[0] = batch_.updates[tensor].count;
    row.array[1] = counted_ + 2 * tensor;
    row.array[2] = counted_ + 2 * tensor + 1;
    row.branch = batch_.updates[tensor].fresh;
  }

 private:
  const UpdateBatch<Formula>& batch_;
  double* counted_;
};

// Whether a batch needs the launch of a CountFormula.
template <class Formula>
bool counts_on_device(const UpdateBatch<Formula>& batch) {
  if constexpr (Formula::State::kCounts) {
    return std::any_of(
        batch.updates, batch.updates + batch.count, [](const auto& update) { return !update.count_on_host; });
  }
  return false;
}

// Calls `run(table)` for each launch that a batch takes; false where there is no kernel for its dtypes. `counted`
// is what BatchSource takes.
template <class Formula, class Run>
bool for_each_table(const UpdateBatch<Formula>& batch, const void* counted, Run&& run) {
  return with_dtypes(batch.kind, [&](auto types) {
    using Types = decltype(types);
    multi_tensor::for_each_table<TileFormula<Formula, Types>>(BatchSource<Formula, Types>(batch, counted), run);
  });
}

}  // namespace torch_freeze
