#include "ops/ops.h"

namespace synergen {
namespace {

// The params that both directions share, after the checks that both need.
RmsNormParams checked(const char* op, Call& call, const Tensor& x, const Tensor& weight,
                      double eps) {
  check_min_dims(op, "x", x, "[..., D]", 1);
  check_dtype(op, "x", x, kFloats);
  check_shape(op, "weight", weight, "[D]", {x.size(-1)});
  if (weight.dtype != DType::kFloat32) check_same_dtype(op, "weight", weight, "x", x);
  check_same_device(op, "x", x, call);
  check_same_device(op, "weight", weight, call);
  if (!(eps >= 0)) refuse(op, ": eps must be >= 0, got ", eps);

  RmsNormParams p{};
  p.dtype = x.dtype;
  p.weight_dtype = weight.dtype;
  p.rows = leading_count(x, 1);
  p.dim = x.size(-1);
  p.eps = eps;
  p.x = x.data;
  p.x_rows = leading_rows(x, 1);
  p.x_stride = x.stride(-1);
  p.weight = weight.data;
  p.weight_stride = weight.stride(0);
  return p;
}

}  // namespace

// x [..., D], weight [D] -> y [..., D]
Tensor rms_norm(Call& call, const Tensor& x, const Tensor& weight, double eps) {
  RmsNormParams p = checked("rms_norm", call, x, weight, eps);
  Tensor y = call.empty("y", x.sizes, x.dtype);
  if (y.numel() == 0) return y;
  p.y = y.data;
  SYNERGEN_LAUNCH(rms_norm, p, call);
  return y;
}

// dy [..., D], x [..., D], weight [D] -> dx [..., D], dweight [D]; dweight is zero where there are
// no rows
std::tuple<Tensor, Tensor> rms_norm_backward(Call& call, const Tensor& dy, const Tensor& x,
                                             const Tensor& weight, double eps) {
  RmsNormBackwardParams p{};
  static_cast<RmsNormParams&>(p) = checked("rms_norm_backward", call, x, weight, eps);
  check_shape("rms_norm_backward", "dy", dy, "[..., D]", x.sizes);
  check_same_dtype("rms_norm_backward", "dy", dy, "x", x);
  Tensor dx = call.empty("dx", x.sizes, x.dtype);
  Tensor dweight = call.empty("dweight", weight.sizes, weight.dtype);
  if (p.dim == 0) return {dx, dweight};
  p.dy = dy.data;
  p.dy_rows = leading_rows(dy, 1);
  p.dy_stride = dy.stride(-1);
  p.dx = dx.data;
  p.dweight = dweight.data;
  SYNERGEN_LAUNCH(rms_norm_backward, p, call);
  return {dx, dweight};
}

// x and residual [..., D], weight [D] -> y [..., D], sum [..., D]
std::tuple<Tensor, Tensor> add_rms_norm(Call& call, const Tensor& x, const Tensor& residual,
                                        const Tensor& weight, double eps) {
  const char* op = "add_rms_norm";
  AddRmsNormParams p{};
  static_cast<RmsNormParams&>(p) = checked(op, call, x, weight, eps);
  check_shape(op, "residual", residual, "as x", x.sizes);
  check_same_dtype(op, "residual", residual, "x", x);
  check_same_device(op, "residual", residual, call);
  Tensor y = call.empty("y", x.sizes, x.dtype);
  Tensor sum = call.empty("sum", x.sizes, x.dtype);
  if (y.numel() == 0) return {y, sum};
  p.residual = residual.data;
  p.residual_rows = leading_rows(residual, 1);
  p.residual_stride = residual.stride(-1);
  p.y = y.data;
  p.sum = sum.data;
  SYNERGEN_LAUNCH(add_rms_norm, p, call);
  return {y, sum};
}

// dy, dsum and sum [..., D], weight [D] -> dx [..., D], which is dresidual too, dweight [D]
std::tuple<Tensor, Tensor> add_rms_norm_backward(Call& call, const Tensor& dy, const Tensor& dsum,
                                                 const Tensor& sum, const Tensor& weight,
                                                 double eps) {
  const char* op = "add_rms_norm_backward";
  AddRmsNormBackwardParams p{};
  static_cast<RmsNormParams&>(p) = checked(op, call, sum, weight, eps);
  for (const auto& [name, t] : {std::pair{"dy", &dy}, std::pair{"dsum", &dsum}}) {
    check_shape(op, name, *t, "as sum", sum.sizes);
    check_same_dtype(op, name, *t, "sum", sum);
    check_same_device(op, name, *t, call);
  }
  Tensor dx = call.empty("dx", sum.sizes, sum.dtype);
  Tensor dweight = call.empty("dweight", weight.sizes, weight.dtype);
  if (p.dim == 0) return {dx, dweight};
  p.dy = dy.data;
  p.dy_rows = leading_rows(dy, 1);
  p.dy_stride = dy.stride(-1);
  p.dsum = dsum.data;
  p.dsum_rows = leading_rows(dsum, 1);
  p.dsum_stride = dsum.stride(-1);
  p.dx = dx.data;
  p.dweight = dweight.data;
  SYNERGEN_LAUNCH(add_rms_norm_backward, p, call);
  return {dx, dweight};
}

}  // namespace synergen
