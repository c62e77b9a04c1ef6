"""What expert_ffn and its backward pass share."""

from . import planted

MUTANTS, add = planted("expert_products.cuh", "expert_ffn.cu")

add("all.data += G::steps(dtype, expert * strides[0]);", "")
add("(pair - token * top_k) * p.weight_strides[1]", "0 * p.weight_strides[1]")
add("if (p.weight == nullptr) return A(1);", "if (p.weight == nullptr) return A(0);")
add("if (m >= rows) return;", "")
add("right[i] *= scale;", "")
add("const bool direct = p.top_k == 1;", "const bool direct = true;")
add("if (count > 0) G::store_run(dtype, to, at, count, left);", "G::store_run(dtype, to, at, count, left);")
add("if (count > 32) G::store_run(dtype, to, at + 32", "if (count > 0) G::store_run(dtype, to, at + 32")
