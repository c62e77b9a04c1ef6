// What both directions of linear_cross_entropy share: which rows count, and a block of logits.
//
// Rows of x are packed as lanes, so that a block of logits has one row a lane: sums over the
// vocabulary are sums of whole vectors.
#pragma once

#include "cpu/gemm.h"
#include "cpu/parallel.h"
#include "kernels.h"

namespace synergen::cpu::SYNERGEN_ISA {

template <class A>
constexpr DType kDTypeOf = std::is_same_v<A, double> ? DType::kFloat64 : DType::kFloat32;

// The rows whose target is not ignore_index, in order. The others cost nothing.
struct CountedRows {
  Scratch<int64_t> index, targets;
  int64_t count = 0;

  explicit CountedRows(const LinearCrossEntropyParams& p) : index(p.rows), targets(p.rows) {
    for (int64_t i = 0; i < p.rows; ++i) {
      const int64_t target = p.targets[i * p.target_stride];
      if (target == p.ignore_index) continue;
      index[count] = i;
      targets[count++] = target;
    }
  }
};

template <class A>
class Logits {
  using V = VecOf<A>;
  static constexpr int64_t N = V::N, L = kLanes<A>;

 public:
  // As in expert_ffn_forward.h: 96 packed rows of weights are 96 KiB, and their logits 72 KiB: half
  // a second-level cache.
  static constexpr int64_t kRowsAtOnce = 192, kColumnsAtOnce = 96;

  // A worker's own memory: for D = 2048 1.7 MB, nearly all of it packed rows.
  class Work {
    friend class Logits;
    Scratch<A> rows, weights{kColumnsAtOnce * kDepth}, block{kRowsAtOnce * kColumnsAtOnce};
    int64_t count = 0;

   public:
    explicit Work(const Logits& logits) : rows(kRowsAtOnce * logits.p_.dim) {}
  };

  Logits(const LinearCrossEntropyParams& p, const CountedRows& counted)
      : p_(p),
        x_{p.dtype, p.x, p.x_strides[0], p.x_strides[1], counted.index.data()},
        weight_{p.weight_dtype, p.weight, p.weight_strides[0], p.weight_strides[1]} {}

  const RowsOf& x() const { return x_; }
  const RowsOf& weight() const { return weight_; }

  void take_rows(Work& work, int64_t row, int64_t count) const {
    work.count = count;
    for (int64_t done = 0; done < count; done += L) {
      pack_panel(x_, row + done, count - done < L ? count - done : L, p_.dim,
                 work.rows.data() + done * p_.dim);
    }
  }

  // f(first row, its logits) for each vector of N rows: logits of column `from + m` at [m * L].
  template <class F>
  void each_vector(const Work& work, int64_t from, int64_t columns, const F& f) const {
    multiply<Order::kByRow>(
        p_.dim, ceil_div(columns, kRows), work.count, p_.dim * L, false,
        [&](int64_t k0, int64_t) { return work.rows.data() + k0 * L; },
        [&](int64_t k0, int64_t n, int64_t block) {
          A* packed = work.weights.data() + block * kRows * kDepth;
          pack_rows(weight_, from + block * kRows, columns - block * kRows, k0, n, packed);
          return packed;
        },
        [&](int64_t k0, int64_t block, int64_t k) {
          if (k0 < p_.dim) weight_.prefetch<A>(from + block * kRows, k0 + k);
        },
        work.block.data());
    for (int64_t lane = 0; lane < work.count; lane += N) {
      f(lane, panel(work, lane, columns) + lane % L);
    }
  }

  // The panel that holds a row, as turn_panel takes it.
  static A* panel(const Work& work, int64_t row, int64_t columns) {
    return work.block.data() + row / L * round_up(columns, kRows) * L;
  }

 private:
  const LinearCrossEntropyParams& p_;
  const RowsOf x_, weight_;
};

}  // namespace synergen::cpu::SYNERGEN_ISA
