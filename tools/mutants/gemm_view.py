"""What kernels around a matrix product share."""

from . import planted

MUTANTS, add = planted("gemm_view.cuh", "expert_ffn.cu")

add("block / (kGroup * wide) * kGroup", "block / (kGroup * wide)")
add("left < kGroup ? left : kGroup", "kGroup")
add("if (dtype == DType::kBFloat16) return f(Type<TensorCores<bf16>>{});", "")
