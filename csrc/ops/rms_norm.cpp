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

}  // namespace synergen
