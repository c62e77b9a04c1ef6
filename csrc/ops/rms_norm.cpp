#include "ops/ops.h"

namespace synergen {

// x [..., D], weight [D] -> y [..., D]
Tensor rms_norm(Call& call, const Tensor& x, const Tensor& weight, double eps) {
  check_min_dims("rms_norm", "x", x, "[..., D]", 1);
  check_dtype("rms_norm", "x", x, kFloats);
  const int64_t dim = x.size(-1), rows = leading_count(x, 1);
  check_shape("rms_norm", "weight", weight, "[D]", {dim});
  if (weight.dtype != DType::kFloat32) check_same_dtype("rms_norm", "weight", weight, "x", x);
  check_same_device("rms_norm", "weight", weight, call);
  if (!(eps >= 0)) refuse("rms_norm: eps must be >= 0, got ", eps);

  Tensor y = call.empty("y", x.sizes, x.dtype);
  if (y.numel() == 0) return y;

  RmsNormParams p{};
  p.dtype = x.dtype;
  p.weight_dtype = weight.dtype;
  p.rows = rows;
  p.dim = dim;
  p.eps = eps;
  p.x = x.data;
  p.x_rows = leading_rows(x, 1);
  p.x_stride = x.stride(-1);
  p.weight = weight.data;
  p.weight_stride = weight.stride(0);
  p.y = y.data;
  cpu::rms_norm(p);
  return y;
}

}  // namespace synergen
