#include "ops/expert_ffn.h"

#include "ops/ops.h"

namespace synergen {
namespace {

// The params that all directions share, after the checks that all need.
ExpertFfnParams checked(const char* op, Call& call, const Tensor& x, const Tensor& gate,
                        const Tensor& up, const Tensor& down, const Tensor& index,
                        const std::optional<Tensor>& weight, const std::optional<Tensor>& order,
                        const std::optional<Tensor>& offsets) {
  check_dims(op, "x", x, "[T, D]", 2);
  check_dtype(op, "x", x, kFloats);
  check_same_device(op, "x", x, call);
  check_dims(op, "gate", gate, "[E, F, D]", 3);
  ExpertFfnParams p{};
  p.tokens = x.size(0);
  p.dim = x.size(1);
  p.experts = gate.size(0);
  p.hidden = gate.size(1);
  check_shape(op, "gate", gate, "[E, F, D]", {p.experts, p.hidden, p.dim});
  check_shape(op, "up", up, "[E, F, D]", {p.experts, p.hidden, p.dim});
  check_shape(op, "down", down, "[E, D, F]", {p.experts, p.dim, p.hidden});
  if (gate.dtype != DType::kFloat32) check_same_dtype(op, "gate", gate, "x", x);
  check_same_dtype(op, "up", up, "gate", gate);
  check_same_dtype(op, "down", down, "gate", gate);
  for (const auto& [name, t] :
       {std::pair{"gate", &gate}, std::pair{"up", &up}, std::pair{"down", &down}}) {
    check_same_device(op, name, *t, call);
  }
  read_routing(op, call, x, index, weight, p);
  read_order(op, call, order, offsets, p);

  p.dtype = x.dtype;
  p.expert_dtype = gate.dtype;
  p.x = x.data;
  std::copy_n(x.strides.begin(), 2, p.x_strides);
  p.gate = gate.data;
  std::copy_n(gate.strides.begin(), 3, p.gate_strides);
  p.up = up.data;
  std::copy_n(up.strides.begin(), 3, p.up_strides);
  p.down = down.data;
  std::copy_n(down.strides.begin(), 3, p.down_strides);
  return p;
}

}  // namespace

// x [T, D], gate and up [E, F, D], down [E, D, F], expert_index and expert_weight [T] or [T, k],
// order [T * k] and offsets [E + 1] of route_tokens, or neither
// -> y [T, D]
Tensor expert_ffn(Call& call, const Tensor& x, const Tensor& gate, const Tensor& up,
                  const Tensor& down, const Tensor& expert_index,
                  const std::optional<Tensor>& expert_weight, const std::optional<Tensor>& order,
                  const std::optional<Tensor>& offsets) {
  ExpertFfnParams p =
      checked("expert_ffn", call, x, gate, up, down, expert_index, expert_weight, order, offsets);
  Tensor y = call.empty("y", x.sizes, x.dtype);
  if (y.numel() == 0) return y;
  if (!call.device.cuda && (p.hidden == 0 || p.top_k == 0)) {
    fill_zero(y);
    return y;
  }
  p.y = y.data;
  SYNERGEN_LAUNCH(expert_ffn, p, call);
  return y;
}

// As expert_ffn -> y [T, D], and what the backward pass wants: gate x and up x, each [T * k, F].
// Rows of pairs without an expert are zero.
std::tuple<Tensor, Tensor, Tensor> expert_ffn_train(Call& call, const Tensor& x, const Tensor& gate,
                                                    const Tensor& up, const Tensor& down,
                                                    const Tensor& expert_index,
                                                    const std::optional<Tensor>& expert_weight,
                                                    const std::optional<Tensor>& order,
                                                    const std::optional<Tensor>& offsets) {
  ExpertFfnParams p = checked("expert_ffn_train", call, x, gate, up, down, expert_index,
                              expert_weight, order, offsets);
  Tensor y = call.empty("y", x.sizes, x.dtype);
  Tensor gate_pre = call.empty("gate_pre", {p.tokens * p.top_k, p.hidden}, x.dtype);
  Tensor up_pre = call.empty("up_pre", {p.tokens * p.top_k, p.hidden}, x.dtype);
  if (p.tokens == 0) return {y, gate_pre, up_pre};
  if (!call.device.cuda && (y.numel() == 0 || gate_pre.numel() == 0)) {
    for (const Tensor& t : {y, gate_pre, up_pre}) fill_zero(t);
    return {y, gate_pre, up_pre};
  }
  p.y = y.data;
  p.gate_pre = gate_pre.data;
  p.up_pre = up_pre.data;
  SYNERGEN_LAUNCH(expert_ffn, p, call);
  return {y, gate_pre, up_pre};
}

// dy [T, D], the inputs of expert_ffn, and gate_pre, up_pre [T * k, F] (or neither: computed again)
// -> dx, dgate, dup, ddown, dweight, each shaped like its input, or [0] where it is not needed
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> expert_ffn_backward(
    Call& call, const Tensor& dy, const Tensor& x, const Tensor& gate, const Tensor& up,
    const Tensor& down, const Tensor& expert_index, const std::optional<Tensor>& expert_weight,
    const std::optional<Tensor>& gate_pre, const std::optional<Tensor>& up_pre, bool need_x,
    bool need_experts, bool need_weight, const std::optional<Tensor>& order,
    const std::optional<Tensor>& offsets) {
  const char* op = "expert_ffn_backward";
  ExpertFfnBackwardParams p{};
  static_cast<ExpertFfnParams&>(p) =
      checked(op, call, x, gate, up, down, expert_index, expert_weight, order, offsets);
  check_shape(op, "dy", dy, "[T, D]", x.sizes);
  check_same_dtype(op, "dy", dy, "x", x);
  if (gate_pre.has_value() != up_pre.has_value()) {
    refuse(op, ": gate_pre and up_pre must come together or not at all");
  }
  for (const auto& [name, pre] : {std::pair{"gate_pre", &gate_pre}, std::pair{"up_pre", &up_pre}}) {
    if (!*pre) continue;
    check_shape(op, name, **pre, "[T * k, F]", {p.tokens * p.top_k, p.hidden});
    check_same_dtype(op, name, **pre, "x", x);
    check_same_device(op, name, **pre, call);
    if ((*pre)->strides != Sizes{p.hidden, 1} && (*pre)->numel() > 1) {
      refuse(op, ": ", name, " must be contiguous, got strides ", to_string((*pre)->strides));
    }
  }
  need_weight = need_weight && expert_weight.has_value();

  const Sizes none = {0};
  Tensor dx = call.empty("dx", need_x ? x.sizes : none, x.dtype);
  Tensor dgate = call.empty("dgate", need_experts ? gate.sizes : none, gate.dtype);
  Tensor dup = call.empty("dup", need_experts ? up.sizes : none, gate.dtype);
  Tensor ddown = call.empty("ddown", need_experts ? down.sizes : none, gate.dtype);
  Tensor dweight = call.empty("dweight", need_weight ? expert_index.sizes : none,
                              expert_weight ? expert_weight->dtype : x.dtype);
  if (!call.device.cuda && (p.dim == 0 || p.hidden == 0 || p.tokens * p.top_k == 0)) {
    for (const Tensor& t : {dx, dgate, dup, ddown, dweight}) fill_zero(t);
    return {dx, dgate, dup, ddown, dweight};
  }
  p.dy = dy.data;
  std::copy_n(dy.strides.begin(), 2, p.dy_strides);
  p.gate_pre = gate_pre ? gate_pre->data : nullptr;
  p.up_pre = up_pre ? up_pre->data : nullptr;
  p.dx = need_x ? dx.data : nullptr;
  p.dgate = need_experts ? dgate.data : nullptr;
  p.dup = need_experts ? dup.data : nullptr;
  p.ddown = need_experts ? ddown.data : nullptr;
  p.dweight = need_weight ? dweight.data : nullptr;
  SYNERGEN_LAUNCH(expert_ffn_backward, p, call);
  return {dx, dgate, dup, ddown, dweight};
}

}  // namespace synergen
