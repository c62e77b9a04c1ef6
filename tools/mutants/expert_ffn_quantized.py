"""expert_ffn_quantized."""

from . import planted

MUTANTS, add = planted("expert_ffn_quantized.cu")

add("group == row ? 31 :", "false ? 31 :")
add(
    "matrix(p.up, p.up_strides, p.up_scale, p.up_scale_strides)",
    "matrix(p.up, p.up_strides, p.gate_scale, p.gate_scale_strides)",
)
add("log2_of(p.gate_group, p.dim)", "log2_of(p.down_group, p.hidden)")
add("log2_of(p.down_group, p.hidden), p.scratch", "log2_of(p.gate_group, p.dim), p.scratch")
