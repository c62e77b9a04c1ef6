// Turns a host function of csrc/ops/ into a torch op of the stable ABI. The only file that includes
// torch headers.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "ops/ops.h"

namespace synergen::bind {

using TorchTensor = torch::stable::Tensor;
using torch::headeronly::ScalarType;

inline DType dtype_from(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::Long:
      return DType::kInt64;
    case ScalarType::Bool:
      return DType::kBool;
    case ScalarType::Int:
      return DType::kInt32;
    case ScalarType::Short:
      return DType::kInt16;
    case ScalarType::Char:
      return DType::kInt8;
    case ScalarType::Byte:
      return DType::kUInt8;
    default:
      return DType::kOther;
  }
}

inline ScalarType dtype_to(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return ScalarType::Double;
    case DType::kFloat32:
      return ScalarType::Float;
    case DType::kBFloat16:
      return ScalarType::BFloat16;
    case DType::kFloat16:
      return ScalarType::Half;
    case DType::kInt64:
      return ScalarType::Long;
    case DType::kBool:
      return ScalarType::Bool;
    case DType::kInt32:
      return ScalarType::Int;
    default:
      throw std::logic_error("dtype_to: no kernel makes this dtype");
  }
}

inline Tensor view_of(const TorchTensor& t) {
  if (t.dim() > kMaxDims)
    refuse("synergen_ext: tensors may have at most ", kMaxDims, " dimensions, got ", t.dim());
  Tensor view;
  const auto sizes = t.sizes(), strides = t.strides();
  view.sizes.assign(sizes.begin(), sizes.end());
  view.strides.assign(strides.begin(), strides.end());
  view.data = t.data_ptr();
  view.dtype = dtype_from(t.scalar_type());
  view.device.cuda = t.is_cuda();
  view.device.index = view.device.cuda ? t.get_device_index() : 0;
  view.owner = std::make_shared<TorchTensor>(t);
  return view;
}

class TorchCall : public Call {
 public:
  // Device and stream are those of the op's first tensor.
  explicit TorchCall(const TorchTensor& like) : like_(like) {
    device.cuda = like.is_cuda();
    if (device.cuda) {
      device.index = like.get_device_index();
      guard_.emplace(device.index);
      stream = torch::stable::accelerator::getCurrentStream(device.index).nativeHandle();
    }
  }
  Tensor empty(const char*, const Sizes& sizes, DType dtype) override {
    const torch::headeronly::IntHeaderOnlyArrayRef ref(sizes.data(), sizes.size());
    return view_of(torch::stable::new_empty(like_, ref, dtype_to(dtype)));
  }
  // torch hands freed memory out again on the same stream only, so it may go when the call ends.
  void* scratch(int64_t bytes) override {
    const torch::headeronly::IntHeaderOnlyArrayRef ref(&bytes, 1);
    scratch_.push_back(torch::stable::new_empty(like_, ref, ScalarType::Byte));
    return scratch_.back().data_ptr();
  }

 private:
  const TorchTensor& like_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  std::vector<TorchTensor> scratch_;
};

// Argument and result types as torch sees them.
template <class T>
struct ToTorch {
  using type = T;
  static const T& in(const T& x) { return x; }
};
template <>
struct ToTorch<Tensor> {
  using type = TorchTensor;
  static Tensor in(const TorchTensor& x) { return view_of(x); }
  static TorchTensor out(const Tensor& x) { return *static_cast<TorchTensor*>(x.owner.get()); }
};
template <>
struct ToTorch<std::optional<Tensor>> {
  using type = std::optional<TorchTensor>;
  static std::optional<Tensor> in(const std::optional<TorchTensor>& x) {
    return x ? std::optional<Tensor>(view_of(*x)) : std::nullopt;
  }
};
template <>
struct ToTorch<std::vector<Tensor>> {
  using type = std::vector<TorchTensor>;
  static std::vector<Tensor> in(const std::vector<TorchTensor>& x) {
    std::vector<Tensor> views;
    for (const TorchTensor& each : x) views.push_back(view_of(each));
    return views;
  }
};
template <class... Ts>
struct ToTorch<std::tuple<Ts...>> {
  using type = std::tuple<typename ToTorch<Ts>::type...>;
  static type out(const std::tuple<Ts...>& x) {
    return std::apply([](const auto&... each) { return type(ToTorch<Tensor>::out(each)...); }, x);
  }
};

template <class F, F* fn>
struct TorchOp;

template <class R, class First, class... Rest, R (*fn)(Call&, First, Rest...)>
struct TorchOp<R(Call&, First, Rest...), fn> {
  template <class T>
  using As = ToTorch<std::remove_cvref_t<T>>;

  static typename As<R>::type call(typename As<First>::type first,
                                   typename As<Rest>::type... rest) {
    TorchCall call(first);
    return As<R>::out(fn(call, As<First>::in(first), As<Rest>::in(rest)...));
  }
};

}  // namespace synergen::bind

#define SYNERGEN_TORCH_OP(fn) TORCH_BOX((&synergen::bind::TorchOp<decltype(fn), &fn>::call))
