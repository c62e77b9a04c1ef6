// route_tokens on the CPU: a counting sort, on one thread. 8192 pairs take 32 us (bench_ops.py),
// the products that follow thousands.
#include "cpu/scratch.h"
#include "kernels.h"

namespace synergen::cpu::SYNERGEN_ISA {

void route_tokens(const RouteTokensParams& p) {
  const auto for_each_routed = [&](const auto& f) {
    for (int64_t t = 0; t < p.tokens; ++t) {
      for (int64_t j = 0; j < p.top_k; ++j) {
        const int64_t e = p.index[t * p.index_strides[0] + j * p.index_strides[1]];
        if (e >= 0 && e < p.experts) f(t * p.top_k + j, e);
      }
    }
  };
  Scratch<int32_t> next(p.experts + 1);
  for (int64_t e = 0; e <= p.experts; ++e) p.offsets[e] = 0;
  for_each_routed([&](int64_t, int64_t e) { ++p.offsets[e + 1]; });
  for (int64_t e = 0; e < p.experts; ++e) p.offsets[e + 1] += p.offsets[e];
  for (int64_t e = 0; e < p.experts; ++e) next[e] = p.offsets[e];
  for_each_routed(
      [&](int64_t pair, int64_t e) { p.order[next[e]++] = static_cast<int32_t>(pair); });
  for (int64_t row = p.offsets[p.experts]; row < p.tokens * p.top_k; ++row) p.order[row] = -1;
}

}  // namespace synergen::cpu::SYNERGEN_ISA
