// What the forward and the backward pass of expert_ffn share: rows sorted by expert, and where
// results go.
#pragma once

#include "cpu/gemm.h"
#include "cpu/parallel.h"
#include "cpu/route_tokens.h"
#include "kernels.h"

namespace synergen::cpu::SYNERGEN_ISA {

// Pairs (t, j), numbered t * top_k + j, sorted by expert with a counting sort. Pairs without an
// expert are left out.
template <class A>
struct Routing {
  Scratch<int64_t> offsets;  // [experts + 1]: rows of expert e are offsets[e] .. offsets[e + 1]
  Scratch<int64_t> pairs;    // of each row
  Scratch<int64_t> tokens;   // of each row
  Scratch<A> weights;        // of each row
  int64_t rows;

  explicit Routing(const ExpertFfnParams& p)
      : offsets(p.experts + 1),
        pairs(p.tokens * p.top_k),
        tokens(p.tokens * p.top_k),
        weights(p.tokens * p.top_k) {
    sort_pairs(p, pairs.data(), offsets.data());
    rows = offsets[p.experts];
    const RowsOf weight{p.weight_dtype, p.weight, p.weight_strides[0], p.weight_strides[1]};
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t t = pairs[row] / p.top_k;
      tokens[row] = t;
      weights[row] = A(1);
      if (p.weight) weight.load(t, pairs[row] - t * p.top_k, 1, &weights[row]);
    }
  }
};

// Rows of expert e of a [experts, rows, columns] stack.
inline RowsOf expert_rows(DType dtype, const void* data, const int64_t (&strides)[3], int64_t e) {
  const RowsOf stack{dtype, data, strides[0], 1};
  return {dtype, stack.at(e, 0), strides[1], strides[2]};
}

// Sums over the experts of a token. With one expert a token, a row goes straight to its place, in
// the dtype of the output. With more, rows wait in float or double, one for each pair, and are
// added in the order of j: no atomics, the same bits in every run.
template <class A>
class TokenSums {
 public:
  TokenSums(const ExpertFfnParams& p, const Routing<A>& routing, void* out)
      : p_(p),
        routing_(routing),
        out_(out),
        rows_(out && p.top_k > 1 ? p.tokens * p.top_k * p.dim : 0) {
    if (out && p.top_k == 1 && routing.rows < p.tokens)
      std::memset(out, 0, p.tokens * p.dim * size_of(p.dtype));
  }
  void put(int64_t row, int64_t from, const A* values, A scale, int64_t n) const {
    const int64_t offset = routing_.pairs[row] * p_.dim + from;
    if (p_.top_k == 1) {
      store_row(p_.dtype, out_, offset, values, scale, n);
    } else {
      store_row(dtype_of_accumulator(), rows_.data(), offset, values, scale, n);
    }
  }
  void finish() const {
    using V = VecOf<A>;
    if (p_.top_k == 1) return;
    parallel_for(p_.tokens, ceil_div(16384, p_.dim * p_.top_k), [&](int64_t begin, int64_t end) {
      Scratch<A> sum(round_up(p_.dim, V::N));
      for (int64_t t = begin; t < end; ++t) {
        fill_zero(sum.data(), p_.dim);
        for (int64_t j = 0; j < p_.top_k; ++j) {
          if (p_.index[t * p_.index_strides[0] + j * p_.index_strides[1]] >= p_.experts) continue;
          const A* row = rows_.data() + (t * p_.top_k + j) * p_.dim;
          for (int64_t i = 0; i < p_.dim; ++i) sum[i] += row[i];
        }
        store_row(p_.dtype, out_, t * p_.dim, sum.data(), A(1), p_.dim);
      }
    });
  }
  static constexpr DType dtype_of_accumulator() {
    return std::is_same_v<A, double> ? DType::kFloat64 : DType::kFloat32;
  }

 private:
  const ExpertFfnParams& p_;
  const Routing<A>& routing_;
  void* out_;
  Scratch<A> rows_;
};

}  // namespace synergen::cpu::SYNERGEN_ISA
