#include <algorithm>

#include "ops/ops.h"

namespace synergen {
namespace {

// The params that both directions share, after the checks that both need.
LinearCrossEntropyParams checked(const char* op, Call& call, const Tensor& x, const Tensor& weight,
                                 const Tensor& targets, int64_t ignore_index) {
  check_dims(op, "x", x, "[N, D]", 2);
  check_dtype(op, "x", x, kFloats);
  check_dims(op, "weight", weight, "[V, D]", 2);
  LinearCrossEntropyParams p{};
  p.dtype = x.dtype;
  p.weight_dtype = weight.dtype;
  p.rows = x.size(0);
  p.dim = x.size(1);
  p.vocab = weight.size(0);
  p.ignore_index = ignore_index;
  check_shape(op, "weight", weight, "[V, D]", {p.vocab, p.dim});
  if (p.vocab < 1) refuse(op, ": weight must be [V, D] with V >= 1, got ", to_string(weight.sizes));
  if (weight.dtype != DType::kFloat32) check_same_dtype(op, "weight", weight, "x", x);
  check_shape(op, "targets", targets, "[N]", {p.rows});
  check_dtype(op, "targets", targets, {DType::kInt64});
  check_same_device(op, "x", x, call);
  check_same_device(op, "weight", weight, call);
  check_same_device(op, "targets", targets, call);
  p.x = x.data;
  std::copy_n(x.strides.begin(), 2, p.x_strides);
  p.weight = weight.data;
  std::copy_n(weight.strides.begin(), 2, p.weight_strides);
  p.targets = targets.ptr<int64_t>();
  p.target_stride = targets.stride(0);
  // A CUDA kernel cannot refuse a target without a word to the host; its row's loss is NaN there.
  for (int64_t i = 0; i < p.rows && !call.device.cuda; ++i) {
    const int64_t target = p.targets[i * p.target_stride];
    if (target != ignore_index && (target < 0 || target >= p.vocab)) {
      refuse(op, ": targets must be in [0, V=", p.vocab, ") or ignore_index=", ignore_index,
             ", got ", target, " at [", i, "]");
    }
  }
  return p;
}

DType dtype_of_loss(const Tensor& x) {
  return x.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

}  // namespace

// x [N, D], weight [V, D], targets [N] -> loss [N], lse float64 [N]: the logarithm of
// the sum of exp(x_i . w_v). Both are 0 where the target is ignore_index.
std::tuple<Tensor, Tensor> linear_cross_entropy(Call& call, const Tensor& x, const Tensor& weight,
                                                const Tensor& targets, int64_t ignore_index) {
  LinearCrossEntropyParams p =
      checked("linear_cross_entropy", call, x, weight, targets, ignore_index);
  Tensor loss = call.empty("loss", {p.rows}, dtype_of_loss(x));
  Tensor lse = call.empty("lse", {p.rows}, DType::kFloat64);
  if (p.rows == 0) return {loss, lse};
  p.loss = loss.data;
  p.lse = lse.ptr<double>();
  SYNERGEN_LAUNCH(linear_cross_entropy, p, call);
  return {loss, lse};
}

// dloss [N], the inputs of linear_cross_entropy, and its lse [N] -> dx [N, D], dweight [V, D], or
// [0] where it is not needed
std::tuple<Tensor, Tensor> linear_cross_entropy_backward(Call& call, const Tensor& dloss,
                                                         const Tensor& x, const Tensor& weight,
                                                         const Tensor& targets, const Tensor& lse,
                                                         int64_t ignore_index, bool need_x,
                                                         bool need_weight) {
  const char* op = "linear_cross_entropy_backward";
  LinearCrossEntropyBackwardParams p{};
  static_cast<LinearCrossEntropyParams&>(p) = checked(op, call, x, weight, targets, ignore_index);
  for (const auto& [name, t] : {std::pair{"dloss", &dloss}, std::pair{"lse", &lse}}) {
    check_shape(op, name, *t, "[N]", {p.rows});
    check_dtype(op, name, *t, {t == &lse ? DType::kFloat64 : dtype_of_loss(x)});
    check_same_device(op, name, *t, call);
  }
  if (p.rows > 1 && lse.stride(0) != 1) {
    refuse(op, ": lse must be contiguous, got strides ", to_string(lse.strides));
  }
  const Sizes none = {0};
  Tensor dx = call.empty("dx", need_x ? x.sizes : none, x.dtype);
  Tensor dweight = call.empty("dweight", need_weight ? weight.sizes : none, weight.dtype);
  if (dx.numel() == 0 && dweight.numel() == 0) return {dx, dweight};
  p.dloss = dloss.data;
  p.dloss_stride = dloss.stride(0);
  p.lse = lse.ptr<double>();
  p.dx = dx.numel() > 0 ? dx.data : nullptr;
  p.dweight = dweight.numel() > 0 ? dweight.data : nullptr;
  SYNERGEN_LAUNCH(linear_cross_entropy_backward, p, call);
  return {dx, dweight};
}

}  // namespace synergen
