#include "ops/expert_ffn.h"
#include "ops/ops.h"

namespace synergen {
namespace {

const char* const kOp = "expert_ffn_quantized";

// One of gate, up and down, with its scales: [E, rows, columns] and [E, rows, columns / group].
struct Argument {
  const char *name, *form, *scale_name, *scale_form;
  const Tensor &values, &scale;
};

// Columns that share a scale, after all checks.
int64_t check(Call& call, const Argument& a, const Tensor& x, const Tensor& gate, int64_t experts,
              int64_t rows, int64_t columns) {
  const bool nibbles = gate.dtype == DType::kUInt8;
  check_same_dtype(kOp, a.name, a.values, "gate", gate);
  check_shape(kOp, a.name, a.values, a.form, {experts, rows, nibbles ? columns / 2 : columns});
  check_same_device(kOp, a.name, a.values, call);
  check_same_dtype(kOp, a.scale_name, a.scale, "x", x);
  check_dims(kOp, a.scale_name, a.scale, a.scale_form, 3);
  check_same_device(kOp, a.scale_name, a.scale, call);
  const int64_t groups = a.scale.size(2);
  check_shape(kOp, a.scale_name, a.scale, a.scale_form, {experts, rows, groups});
  if (columns == 0) return 1;
  const int64_t group = groups > 0 && columns % groups == 0 ? columns / groups : 0;
  const int64_t least = nibbles ? 32 : 64;
  if (group != columns && (group < least || (group & (group - 1)) != 0)) {
    refuse(kOp, ": ", a.scale_name, " must divide ", columns,
           " columns into groups of a power of two, at least ", least, ", or be one for all, got ",
           groups);
  }
  return group;
}

void copy_strides(const Tensor& t, int64_t (&strides)[3]) {
  std::copy_n(t.strides.begin(), 3, strides);
}

}  // namespace

// x [T, D]; gate and up int8 [E, F, D] or uint8 [E, F, D / 2], down [E, D, F] or [E, D, F / 2];
// gate_scale and up_scale [E, F, D / group], down_scale [E, D, F / group]; expert_index and
// expert_weight [T] or [T, k] -> y [T, D]
Tensor expert_ffn_quantized(Call& call, const Tensor& x, const Tensor& gate, const Tensor& up,
                            const Tensor& down, const Tensor& gate_scale, const Tensor& up_scale,
                            const Tensor& down_scale, const Tensor& expert_index,
                            const std::optional<Tensor>& expert_weight) {
  check_dims(kOp, "x", x, "[T, D]", 2);
  check_dtype(kOp, "x", x, kFloats);
  check_same_device(kOp, "x", x, call);
  check_dtype(kOp, "gate", gate, {DType::kInt8, DType::kUInt8});
  const bool nibbles = gate.dtype == DType::kUInt8;
  check_dims(kOp, "gate", gate, nibbles ? "[E, F, D / 2]" : "[E, F, D]", 3);
  ExpertFfnQuantizedParams p{};
  p.tokens = x.size(0);
  p.dim = x.size(1);
  p.experts = gate.size(0);
  p.hidden = gate.size(1);
  if (nibbles && (p.dim % 8 != 0 || p.hidden % 8 != 0)) {
    refuse(kOp, ": D and F must be multiples of 8 with 4-bit weights, got ", p.dim, " and ",
           p.hidden);
  }
  const char* wide = nibbles ? "[E, F, D / 2]" : "[E, F, D]";
  p.gate_group = check(call, {"gate", wide, "gate_scale", "[E, F, D / group]", gate, gate_scale}, x,
                       gate, p.experts, p.hidden, p.dim);
  const int64_t up_group = check(call, {"up", wide, "up_scale", "[E, F, D / group]", up, up_scale},
                                 x, gate, p.experts, p.hidden, p.dim);
  if (up_group != p.gate_group)
    check_shape(kOp, "up_scale", up_scale, "as gate_scale", gate_scale.sizes);
  p.down_group = check(call,
                       {"down", nibbles ? "[E, D, F / 2]" : "[E, D, F]", "down_scale",
                        "[E, D, F / group]", down, down_scale},
                       x, gate, p.experts, p.dim, p.hidden);
  read_routing(kOp, call, x, expert_index, expert_weight, p);

  Tensor y = call.empty("y", x.sizes, x.dtype);
  if (y.numel() == 0) return y;
  if (!call.device.cuda && (p.hidden == 0 || p.top_k == 0)) {
    fill_zero(y);
    return y;
  }
  p.dtype = x.dtype;
  p.expert_dtype = gate.dtype;
  p.x = x.data;
  std::copy_n(x.strides.begin(), 2, p.x_strides);
  p.gate = gate.data;
  p.up = up.data;
  p.down = down.data;
  p.gate_scale = gate_scale.data;
  p.up_scale = up_scale.data;
  p.down_scale = down_scale.data;
  copy_strides(gate, p.gate_strides);
  copy_strides(up, p.up_strides);
  copy_strides(down, p.down_strides);
  copy_strides(gate_scale, p.gate_scale_strides);
  copy_strides(up_scale, p.up_scale_strides);
  copy_strides(down_scale, p.down_scale_strides);
  p.y = y.data;
  SYNERGEN_LAUNCH(expert_ffn_quantized, p, call);
  return y;
}

}  // namespace synergen
