"""fold_tokens."""

from . import planted

MUTANTS, add = planted("fold_tokens.cu")

add("row / p.m * (p.w / p.n) + col / p.n", "row / p.m * (p.w / p.n) + col / p.m")
add("row % p.m * p.n + col % p.n", "row % p.m * p.m + col % p.n")
add("id >= 0 && id < p.vocab", "id >= 0 && id <= p.vocab")
add("if (token >= tokens) return;", "if (token > tokens) return;")
add("if (i >= count) continue;\n      b[k]", "if (i > count) continue;\n      b[k]")
add("if (i >= count) continue;\n      Pack", "if (i > count) continue;\n      Pack")
add("simt::widen(b[k].v[e]) + mark", "simt::widen(b[k].v[e])")
add("if (at >= total) return;", "if (at > total) return;")
