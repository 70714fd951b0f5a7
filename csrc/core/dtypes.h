// The combinations of dtypes for which there are kernels: the one table of them.
#pragma once

#include <c10/core/DeviceType.h>
#include <c10/core/ScalarType.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <c10/util/StringUtil.h>

#include <cstdint>
#include <string>
#include <tuple>
#include <type_traits>

#include "core/tensor_update.h"

namespace torch_freeze {

// `Buffer` is the type of the optimizer's buffers, such as momentum. `kStochastic`: they are bfloat16 and rounded
// stochastically.
template <class Param_, class Grad_, class Buffer_, bool kStochastic_ = false>
struct Dtypes {
  using Param = Param_;
  using Grad = Grad_;
  using Buffer = Buffer_;
  static constexpr bool kStochastic = kStochastic_;
  // The type of the arithmetic.
  using Value = std::conditional_t<std::is_same_v<Param, double>, double, float>;
  // Gradients narrower than their parameter come from autocast to a GPU.
  static constexpr bool kOnCpu = std::is_same_v<Param, Grad>;

  static constexpr c10::ScalarType kParam = c10::CppTypeToScalarType<Param>::value;
  static constexpr c10::ScalarType kGrad = c10::CppTypeToScalarType<Grad>::value;
  static constexpr c10::ScalarType kBuffer = c10::CppTypeToScalarType<Buffer>::value;
};

using AllDtypes = std::tuple<
    Dtypes<float, float, float>, Dtypes<double, double, double>,
    Dtypes<c10::BFloat16, c10::BFloat16, c10::BFloat16>, Dtypes<c10::Half, c10::Half, c10::Half>,
    Dtypes<float, c10::BFloat16, float>, Dtypes<float, c10::Half, float>,
    Dtypes<float, float, c10::BFloat16, true>, Dtypes<c10::BFloat16, c10::BFloat16, c10::BFloat16, true>>;

namespace detail {

template <class Test, class... Each>
constexpr bool any_dtypes(std::tuple<Each...>*, Test&& test) {
  return (test(Each{}) || ...);
}

template <class Test>
constexpr bool any_dtypes(Test&& test) {
  return any_dtypes(static_cast<AllDtypes*>(nullptr), test);
}

// A bit for each type of parameter that has kernels with a gradient of its own type.
template <class... Each>
constexpr uint64_t param_types(std::tuple<Each...>*, bool stochastic) {
  return (
      (Each::kOnCpu && Each::kStochastic == stochastic ? uint64_t{1} << static_cast<int>(Each::kParam) : 0) | ...);
}
inline constexpr uint64_t kParamTypes = param_types(static_cast<AllDtypes*>(nullptr), false);
inline constexpr uint64_t kStochasticParamTypes = param_types(static_cast<AllDtypes*>(nullptr), true);

}  // namespace detail

inline bool has_kernel(c10::DeviceType device) {
#ifdef WITH_CUDA
  return device == c10::kCPU || device == c10::kCUDA;
#else
  return device == c10::kCPU;
#endif
}

// For a gradient of the parameter's type.
inline bool has_kernel(c10::ScalarType param, bool stochastic) {
  const uint64_t types = stochastic ? detail::kStochasticParamTypes : detail::kParamTypes;
  return (types >> static_cast<int>(param) & 1) != 0;
}

// For buffers of the parameter's type.
inline bool has_kernel(c10::DeviceType device, c10::ScalarType param, c10::ScalarType grad) {
  return detail::any_dtypes([&](auto dtypes) {
    using Each = decltype(dtypes);
    return Each::kParam == param && Each::kGrad == grad && !Each::kStochastic &&
           (Each::kOnCpu || device == c10::kCUDA);
  });
}

// Calls `run(Dtypes<…>{})` for the dtypes of `kind`; false where there is no kernel for them.
template <class Run>
bool with_dtypes(const BatchKind& kind, Run&& run) {
  return detail::any_dtypes([&](auto dtypes) {
    using Each = decltype(dtypes);
    const bool same = kind.param_type == Each::kParam && kind.grad_type == Each::kGrad &&
                      kind.buffer_type == Each::kBuffer && kind.stochastic == Each::kStochastic;
    if (same) {
      run(dtypes);
    }
    return same;
  });
}

// For errors.
inline std::string no_kernel_for(const BatchKind& kind) {
  return c10::str(
      kind.device, ": no kernel for parameters of ", kind.param_type, " with gradients of ", kind.grad_type,
      " and buffers of ", kind.buffer_type, kind.stochastic ? ", rounded stochastically" : "");
}

}  // namespace torch_freeze
