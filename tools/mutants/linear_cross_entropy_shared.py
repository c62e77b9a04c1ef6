"""What linear_cross_entropy and its backward pass share."""

from . import planted

MUTANTS, add = planted("linear_cross_entropy.cuh", "linear_cross_entropy.cu")

add("row + m < p.rows ? x.at(row + m, 0) : x.nowhere()", "x.at(row + m, 0)")
add("column + n < p.vocab ? weight.at(column + n, 0) : weight.nowhere()", "weight.at(column + n, 0)")
add("column + n < p.vocab ? weight.at(column + n, 0)", "n < p.vocab ? weight.at(n, 0)")
add("p.targets[row * p.target_stride]", "p.targets[row]")
add("return simt::fast_exp(x);", "return simt::fast_exp(x) * 2;")
add("p.weight_dtype == p.dtype && ", "")
add("p.dim % 8 == 0 &&", "")
add("packs<bf16>(p.x, p.x_strides[1], p.x_strides, 1)", "true")
add("packs<bf16>(p.weight, p.weight_strides[1], p.weight_strides, 1)", "true")
