"""sample_tokens: the launch. Its steps are in sample.py."""

from . import planted

MUTANTS, add = planted("sample_tokens.cu")

add("blockIdx.x / launch.parts;", "blockIdx.x % launch.parts;")
add("options.temperature >= 0 &&", "")
add("options.top_k >= 0 && ", "")
add("options.top_p <= 1;", "true;")
add("guidance - guidance == 0.0 &&", "")
add("options.temperature - options.temperature == 0.0 &&", "")
add("r * p.uncond_strides[0]", "r * p.logits_strides[0]")
add("simt::grid_sync();", "__syncthreads();")
add("  } else {\n    __syncthreads();\n  }", "  }")
add("bool writes = part == 0;", "bool writes = true;")
add("if (writes) id = row.draw();", "id = row.draw();")
add("p.valid[r] = id >= 0;", "p.valid[r] = true;")
add("p.logits_strides, 1) &&", "p.logits_strides, 0) &&")
add("packs<T>(p.uncond, p.uncond_strides[1], p.uncond_strides, 1)", "true")
