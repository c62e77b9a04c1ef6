#include "ops/expert_ffn.h"
#include "ops/ops.h"

namespace synergen {

// expert_index [T] or [T, k] -> order [T * k], offsets [E + 1], both int32
std::tuple<Tensor, Tensor> route_tokens(Call& call, const Tensor& expert_index, int64_t experts) {
  const char* op = "route_tokens";
  if (expert_index.dim() != 1) check_dims(op, "expert_index", expert_index, "[T] or [T, k]", 2);
  if (experts < 0 || experts >= INT32_MAX) {
    refuse(op, ": experts must be in [0, 2^31 - 1), got ", experts);
  }
  if (expert_index.numel() > INT32_MAX) {
    refuse(op, ": T * k must be below 2^31, got ", expert_index.numel());
  }
  RouteTokensParams p{};
  p.tokens = expert_index.size(0);
  p.experts = experts;
  read_index(op, call, expert_index, p);
  Tensor order = call.empty("order", {p.tokens * p.top_k}, DType::kInt32);
  Tensor offsets = call.empty("offsets", {experts + 1}, DType::kInt32);
  p.order = order.ptr<int32_t>();
  p.offsets = offsets.ptr<int32_t>();
  SYNERGEN_LAUNCH(route_tokens, p, call);
  return {order, offsets};
}

}  // namespace synergen
