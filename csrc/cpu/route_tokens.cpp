// route_tokens on the CPU.
#include "cpu/route_tokens.h"

namespace synergen::cpu::SYNERGEN_ISA {

void route_tokens(const RouteTokensParams& p) {
  sort_pairs(p, p.order, p.offsets);
  for (int64_t row = p.offsets[p.experts]; row < p.tokens * p.top_k; ++row) p.order[row] = -1;
}

}  // namespace synergen::cpu::SYNERGEN_ISA
