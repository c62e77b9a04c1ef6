"""sample_tokens: the launch. Its steps are in sample.py."""

from . import planted

MUTANTS, add = planted("sample_tokens.cu")

add("static_cast<int>(blockIdx.y);", "0;")
add("options.temperature >= 0)", "options.temperature > 0)")
add("grid.y = launch.parts;", "grid.y = launch.parts + 1;")
add("board[0].options = asked;", "board[0].options.word = 0;")
add("static_cast<Acc<T>>(guidance)", "Acc<T>(1)")
add("if (board[0].options.temperature >= 0) {", "{")
add("r * p.uncond_strides[0]", "r * p.logits_strides[0]")
add("simt::grid_sync();", "__syncthreads();")
add("  } else {\n    __syncthreads();\n  }", "  }")
add("bool writes = part == 0;", "bool writes = true;")
add("if (writes) id = row.draw();", "id = row.draw();")
add("p.valid[r] = id >= 0;", "p.valid[r] = true;")
add("p.logits_strides, 1) &&", "p.logits_strides, 0) &&")
add("packs<T>(p.uncond, p.uncond_strides[1], p.uncond_strides, 1)", "true")
