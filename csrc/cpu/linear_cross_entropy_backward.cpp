// The gradients of linear_cross_entropy on the CPU. With p = (exp(logit - lse) - [v = target]) *
// dloss: dx = p weight, dweight = p^T x. Columns pass in pieces: the logits of a piece are computed
// again and become p, [rows, piece], then dx gains its part and dweight gets its rows, complete.
// Every sum has one owner and one order.
//
// Memory: p is at most 32 MiB, or 96 columns where the rows are more than 87,000; the sums of dx
// are [rows, D] in the type of the sums. Pieces of rows instead would want the sums of dweight, [V,
// D], and read and write them once for each piece.
#include <cmath>

#include "cpu/linear_cross_entropy.h"

namespace synergen::cpu::SYNERGEN_ISA {
namespace {

template <class A>
class Backward {
  using V = VecOf<A>;
  using Block = Logits<A>;
  static constexpr int64_t N = V::N, L = kLanes<A>;
  static constexpr int64_t kTall = Block::kRowsAtOnce, kStep = Block::kColumnsAtOnce;
  static constexpr int64_t kWide = 128;          // lanes of a task: columns of dx and dweight
  static constexpr int64_t kStrip = 10 * kStep;  // columns of a task that makes p
  static constexpr int64_t kMostBytes = int64_t{32} << 20;

 public:
  explicit Backward(const LinearCrossEntropyBackwardParams& p)
      : p_(p),
        counted_(p),
        logits_(p, counted_),
        rows_(counted_.count),
        piece_(piece_of(rows_, p.vocab)),
        step_(round_up(piece_, N)),
        wide_(ceil_div(p.dim, kWide)),
        p_rows_(rows_ * step_),
        sums_(p.dx && piece_ < p.vocab ? ceil_div(rows_, kTall) * wide_ * kTall * kWide : 0) {}

  void run() const {
    if (p_.dx && rows_ < p_.rows) std::memset(p_.dx, 0, p_.rows * p_.dim * size_of(p_.dtype));
    for (int64_t first = 0; first < p_.vocab; first += piece_) {
      const int64_t columns = p_.vocab - first < piece_ ? p_.vocab - first : piece_;
      probabilities(first, columns);
      if (p_.dx) input(first, columns);
      if (p_.dweight) weights(first, columns);
    }
  }

 private:
  struct Work {
    Scratch<A> left{kTall * kDepth}, right{kWide * kDepth}, product{kTall * kWide}, row{kWide};
  };

  static int64_t piece_of(int64_t rows, int64_t vocab) {
    const int64_t most = kMostBytes / static_cast<int64_t>(sizeof(A)) / (rows > 0 ? rows : 1);
    const int64_t piece = most < kStep ? kStep : most / kStep * kStep;
    return piece < vocab ? piece : vocab;
  }

  void probabilities(int64_t first, int64_t columns) const {
    const int64_t chunks = ceil_div(rows_, kTall), tasks = chunks * ceil_div(columns, kStrip);
    parallel_tasks(tasks, [&](const auto& claim) {
      typename Block::Work work(logits_);
      for (int64_t task; (task = claim()) < tasks;) {
        const int64_t row = task % chunks * kTall, begin = task / chunks * kStrip;
        const int64_t rows = rows_ - row < kTall ? rows_ - row : kTall;
        const int64_t end = begin + kStrip < columns ? begin + kStrip : columns;
        logits_.take_rows(work, row, rows);
        for (int64_t from = begin; from < end; from += kStep) {
          const int64_t count = end - from < kStep ? end - from : kStep;
          logits_.each_vector(work, first + from, count, [&](int64_t lane, A* logits) {
            differentiate(row + lane, first + from, count, logits);
          });
          for (int64_t lane = 0; lane < rows; lane += L) {
            turn_panel(Block::panel(work, lane, count), count, rows - lane < L ? rows - lane : L,
                       p_rows_.data() + (row + lane) * step_ + from, step_);
          }
        }
      }
    });
  }

  // Logits of N rows become p.
  void differentiate(int64_t row, int64_t from, int64_t columns, A* logits) const {
    alignas(64) A high[N] = {}, low[N] = {}, scale[N] = {}, target[N] = {};
    const int64_t rows = rows_ - row < N ? rows_ - row : N;
    const auto place = [&](int64_t i) {
      const int64_t m = counted_.targets[row + i] - from;
      return m >= 0 && m < columns ? logits + m * L + i : nullptr;
    };
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t at = counted_.index[row + i];
      high[i] = static_cast<A>(p_.lse[at]);
      low[i] = static_cast<A>(p_.lse[at] - high[i]);
      scale[i] = static_cast<const A*>(p_.dloss)[at * p_.dloss_stride];
      if (const A* logit = place(i)) target[i] = *logit;
    }
    const V lse = V::load(high), rest = V::load(low), factor = V::load(scale);
    for (int64_t m = 0; m < columns; ++m) {
      (exp((V::load(logits + m * L) - lse) - rest) * factor).store(logits + m * L);
    }
    for (int64_t i = 0; i < rows; ++i) {
      if (A* p = place(i)) *p = std::expm1((target[i] - high[i]) - low[i]) * scale[i];
    }
  }

  RowsOf p_rows() const { return {kDTypeOf<A>, p_rows_.data(), step_, 1}; }

  // dx (+)= p weight, one task for 192 rows and 128 columns.
  void input(int64_t first, int64_t columns) const {
    const int64_t tasks = ceil_div(rows_, kTall) * wide_;
    parallel_tasks(tasks, [&](const auto& claim) {
      const Work work;
      for (int64_t task; (task = claim()) < tasks;) {
        const int64_t row = task / wide_ * kTall, from = task % wide_ * kWide;
        const int64_t rows = rows_ - row < kTall ? rows_ - row : kTall;
        const int64_t wide = p_.dim - from < kWide ? p_.dim - from : kWide;
        A* product = piece_ < p_.vocab ? sums_.data() + task * kTall * kWide : work.product.data();
        multiply<Order::kByRow>(
            columns, ceil_div(rows, kRows), wide, kDepth * L, first > 0,
            [&](int64_t k0, int64_t n) {
              pack_lanes(logits_.weight(), first, columns, k0, n, from, wide, work.right.data());
              return work.right.data();
            },
            [&](int64_t k0, int64_t n, int64_t block) {
              A* packed = work.left.data() + block * kRows * kDepth;
              pack_rows(p_rows(), row + block * kRows, rows - block * kRows, k0, n, packed);
              return packed;
            },
            NothingAhead{}, product);
        if (first + columns < p_.vocab) continue;
        for (int64_t r = 0; r < rows; ++r) {
          gather(product, r, rows, wide, work);
          store_row(p_.dtype, p_.dx, counted_.index[row + r] * p_.dim + from, work.row.data(), A(1),
                    wide);
        }
      }
    });
  }

  // Rows of dweight = p^T x, one task for 96 rows and 128 columns.
  void weights(int64_t first, int64_t columns) const {
    const int64_t tasks = ceil_div(columns, kStep) * wide_;
    parallel_tasks(tasks, [&](const auto& claim) {
      const Work work;
      for (int64_t task; (task = claim()) < tasks;) {
        const int64_t top = task / wide_ * kStep, from = task % wide_ * kWide;
        const int64_t tall = columns - top < kStep ? columns - top : kStep;
        const int64_t wide = p_.dim - from < kWide ? p_.dim - from : kWide;
        multiply<Order::kByDepth>(
            rows_, ceil_div(tall, kRows), wide, kDepth * L, false,
            [&](int64_t k0, int64_t n) {
              pack_lanes(logits_.x(), 0, rows_, k0, n, from, wide, work.right.data());
              return work.right.data();
            },
            [&](int64_t k0, int64_t n, int64_t block) {
              if (block == 0) pack_columns(p_rows(), 0, rows_, k0, n, top, tall, work.left.data());
              return work.left.data() + block * kRows * kDepth;
            },
            NothingAhead{}, work.product.data());
        for (int64_t r = 0; r < tall; ++r) {
          gather(work.product.data(), r, tall, wide, work);
          store_row(p_.weight_dtype, p_.dweight, (first + top + r) * p_.dim + from, work.row.data(),
                    A(1), wide);
        }
      }
    });
  }

  // work.row = row r of a product [panel][rows][L]
  static void gather(const A* product, int64_t r, int64_t rows, int64_t wide, const Work& work) {
    for (int64_t i = 0; i < wide; i += N) {
      V::load(product + (i / L * round_up(rows, kRows) + r) * L + i % L).store(work.row.data() + i);
    }
  }

  const LinearCrossEntropyBackwardParams& p_;
  const CountedRows counted_;
  const Block logits_;
  const int64_t rows_, piece_, step_, wide_;
  Scratch<A> p_rows_;  // [rows, step]
  Scratch<A> sums_;    // a product for each task of `input`
};

}  // namespace

void linear_cross_entropy_backward(const LinearCrossEntropyBackwardParams& p) {
  if (p.dtype == DType::kFloat64) {
    Backward<double>(p).run();
  } else {
    Backward<float>(p).run();
  }
}

}  // namespace synergen::cpu::SYNERGEN_ISA
