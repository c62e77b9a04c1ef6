// The counting sort of route_tokens and expert_ffn on the CPU.
#pragma once

#include "kernels.h"

namespace synergen::cpu::SYNERGEN_ISA {

// f(pair, expert) for the pairs (token, j), numbered token * top_k + j, that have an expert.
template <class Params, class F>
void for_each_routed(const Params& p, const F& f) {
  for (int64_t t = 0; t < p.tokens; ++t) {
    for (int64_t j = 0; j < p.top_k; ++j) {
      const int64_t e = p.index[t * p.index_strides[0] + j * p.index_strides[1]];
      if (e >= 0 && e < p.experts) f(t * p.top_k + j, e);
    }
  }
}

// Those pairs sorted by expert, in the order they come: those of expert e are order[offsets[e]] to
// order[offsets[e + 1] - 1]. One thread: 8192 pairs take 32 us (bench_ops.py), the products that
// follow thousands.
template <class Params, class Int>
void sort_pairs(const Params& p, Int* order, Int* offsets) {
  // offsets[e + 1] is where the next pair of e goes; at the end that is where e + 1 begins.
  for (int64_t e = 0; e <= p.experts; ++e) offsets[e] = 0;
  for_each_routed(p, [&](int64_t, int64_t e) {
    if (e + 2 <= p.experts) ++offsets[e + 2];
  });
  for (int64_t e = 2; e <= p.experts; ++e) offsets[e] += offsets[e - 1];
  for_each_routed(
      p, [&](int64_t pair, int64_t e) { order[offsets[e + 1]++] = static_cast<Int>(pair); });
}

}  // namespace synergen::cpu::SYNERGEN_ISA
