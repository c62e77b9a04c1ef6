// From a dtype known at run time to a type known at compile time.
#pragma once

#include <stdexcept>
#include <type_traits>

#include "common/types.h"

namespace synergen {

template <class T>
struct Type {
  using type = T;
};

// Sums and products run in this type: double for double, float for everything shorter.
template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

// dispatch_float(p.dtype, [&](auto tag) { using T = typename decltype(tag)::type; ... });
template <class F>
void dispatch_float(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat64:
      return f(Type<double>{});
    case DType::kFloat32:
      return f(Type<float>{});
    case DType::kBFloat16:
      return f(Type<bf16>{});
    case DType::kFloat16:
      return f(Type<f16>{});
    default:
      throw std::logic_error("dispatch_float: not a floating-point dtype");
  }
}

}  // namespace synergen
