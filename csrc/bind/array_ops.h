// Every op as a plain function over arrays, with its arguments' names and defaults.
#pragma once

#include "bind/array_op.h"

namespace synergen::bind {

inline void define_array_ops(py::module_& kernels) {
  using py::arg;
  SYNERGEN_ARRAY_OP(kernels, rms_norm, arg("x"), arg("weight"), arg("eps") = 1e-5);
  SYNERGEN_ARRAY_OP(kernels, rms_norm_backward, arg("dy"), arg("x"), arg("weight"),
                    arg("eps") = 1e-5);
  SYNERGEN_ARRAY_OP(kernels, add_rms_norm, arg("x"), arg("residual"), arg("weight"),
                    arg("eps") = 1e-5);
  SYNERGEN_ARRAY_OP(kernels, add_rms_norm_backward, arg("dy"), arg("dsum"), arg("sum"),
                    arg("weight"), arg("eps") = 1e-5);
  SYNERGEN_ARRAY_OP(kernels, rope, arg("q"), arg("k"), arg("positions"), arg("theta") = 1e6,
                    arg("inverse") = false);
  SYNERGEN_ARRAY_OP(kernels, fold_tokens, arg("ids"), arg("table"), arg("pos"), arg("m"), arg("n"));
  SYNERGEN_ARRAY_OP(kernels, fold_tokens_backward, arg("dy"), arg("ids"), arg("vocab"), arg("m"),
                    arg("n"));
  SYNERGEN_ARRAY_OP(kernels, fold_ids, arg("ids"), arg("m"), arg("n"));
  SYNERGEN_ARRAY_OP(kernels, unfold_ids, arg("ids"), arg("h"), arg("w"), arg("m"), arg("n"));
  SYNERGEN_ARRAY_OP(kernels, route_tokens, arg("expert_index"), arg("experts"));
  SYNERGEN_ARRAY_OP(kernels, expert_ffn, arg("x"), arg("gate"), arg("up"), arg("down"),
                    arg("expert_index"), arg("expert_weight") = py::none(),
                    arg("order") = py::none(), arg("offsets") = py::none());
  SYNERGEN_ARRAY_OP(kernels, expert_ffn_train, arg("x"), arg("gate"), arg("up"), arg("down"),
                    arg("expert_index"), arg("expert_weight") = py::none(),
                    arg("order") = py::none(), arg("offsets") = py::none());
  SYNERGEN_ARRAY_OP(kernels, expert_ffn_backward, arg("dy"), arg("x"), arg("gate"), arg("up"),
                    arg("down"), arg("expert_index"), arg("expert_weight") = py::none(),
                    arg("gate_pre") = py::none(), arg("up_pre") = py::none(), arg("need_x") = true,
                    arg("need_experts") = true, arg("need_weight") = true,
                    arg("order") = py::none(), arg("offsets") = py::none());
  SYNERGEN_ARRAY_OP(kernels, expert_ffn_quantized, arg("x"), arg("gate"), arg("up"), arg("down"),
                    arg("gate_scale"), arg("up_scale"), arg("down_scale"), arg("expert_index"),
                    arg("expert_weight") = py::none());
  SYNERGEN_ARRAY_OP(kernels, decode_attention, arg("q"), arg("k_cache"), arg("v_cache"),
                    arg("lengths"), arg("starts") = py::none(), arg("scale") = py::none());
  SYNERGEN_ARRAY_OP(kernels, linear_cross_entropy, arg("x"), arg("weight"), arg("targets"),
                    arg("ignore_index") = -100);
  SYNERGEN_ARRAY_OP(kernels, linear_cross_entropy_backward, arg("dloss"), arg("x"), arg("weight"),
                    arg("targets"), arg("lse"), arg("ignore_index") = -100, arg("need_x") = true,
                    arg("need_weight") = true);
  SYNERGEN_ARRAY_OP(kernels, sample_tokens, arg("logits"), arg("seed"), arg("position"),
                    arg("uncond_logits") = py::none(), arg("guidance") = py::none(),
                    arg("temperature") = py::none(), arg("top_k") = py::none(),
                    arg("top_p") = py::none());
  SYNERGEN_ARRAY_OP(kernels, unfold_head, arg("states"), arg("tokens"), arg("positions"),
                    arg("layers"), arg("biases"), arg("norm"), arg("classifier"), arg("seed"),
                    arg("position"), arg("guidance") = py::none(), arg("temperature") = py::none(),
                    arg("top_k") = py::none(), arg("top_p") = py::none(), arg("eps") = 1e-5,
                    arg("theta") = 1e6, arg("heads") = 1, arg("kv_heads") = 1,
                    arg("persistent") = false);
}

}  // namespace synergen::bind
