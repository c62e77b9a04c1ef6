// Gradients of expert_ffn on the CPU: the hidden layer's, then the input's, then the weights', each
// one parallel region over blocks of the result. Every sum has one owner and one order, so two runs
// give the same bits.
//
// With h = silu(g) * u, s = sigmoid(g), a routing weight w and dh = down^T dy:
//   dw = h . dh,  du = w dh silu(g),  dg = w dh u s (1 + g (1 - s)),  dx = gate^T dg + up^T du,
//   dgate = sum dg x^T,  dup = sum du x^T,  ddown = sum w dy h^T.
#pragma once

#include "cpu/expert_ffn.h"

namespace synergen::cpu::SYNERGEN_ISA {

// P is the packed number (gemm.h). In pairs, D and F are even and everything is bfloat16, the
// gradients of the hidden layer too, as in PyTorch.
template <class P>
class ExpertFfnBackward {
  using A = Acc<P>;
  using S = Element<P>;
  using V = VecOf<A>;
  static constexpr int64_t N = V::N, L = kLanes<P>, kPer = kPerPacked<P>;
  // Packed, 192 lanes (columns of the result) of a task are 192 KiB, 264 rows of an expert 264 KiB,
  // their product 198 KiB: most of a second-level cache of 1 MiB. On Zen 5 (D = 2048, F = 8192, 512
  // rows, bfloat16) 2 to 5 % faster than 128 lanes, 32 rows an expert 10 %; 256 lanes are slower.
  static constexpr int64_t kWide = 192;
  static constexpr int64_t kChunk = 264;
  static constexpr int64_t kTall = 192;  // rows of a weight gradient in one task
  // Most blocks of depth whose left rows stay packed (384 KiB) for the next task, which often wants
  // the same ones.
  static constexpr int64_t kKept = 2;

 public:
  explicit ExpertFfnBackward(const ExpertFfnBackwardParams& p)
      : p_(p),
        routing_(p),
        step_(round_up(p.hidden, N)),
        blocks_(ceil_div(p.hidden, kWide)),
        hidden_(routing_.rows * step_),
        dgate_(routing_.rows * step_),
        dup_(routing_.rows * step_),
        dweight_(routing_.rows * blocks_) {}

  void run() const {
    each_block(p_.hidden, [&](int64_t e, int64_t from, int64_t row, int64_t rows,
                              const Work& work) { hidden(e, from, row, rows, work); });
    if (p_.dweight) reduce_dweight();
    if (p_.dx) {
      const TokenSums<A> sums(p_, routing_, p_.dx);
      each_block(p_.dim, [&](int64_t e, int64_t from, int64_t row, int64_t rows, const Work& work) {
        input(e, from, row, rows, sums, work);
      });
      sums.finish();
    }
    if (p_.dgate) {
      const RowsOf x{p_.dtype, p_.x, p_.x_strides[0], p_.x_strides[1], routing_.tokens.data()};
      weights(p_.hidden, p_.dim, inner(dgate_), x, p_.dgate);
      weights(p_.hidden, p_.dim, inner(dup_), x, p_.dup);
      weights(p_.dim, p_.hidden, dy(), inner(hidden_), p_.ddown);
    }
  }

 private:
  struct Work {
    static constexpr int64_t kMost = kKept * kTall > kChunk ? kKept * kTall : kChunk;
    Scratch<P> left{kMost * kDepth}, right{kWide * kDepth};
    Scratch<A> product{kChunk * kWide};
    Scratch<A> gate{kWide}, up{kWide}, row{kWide};
  };

  RowsOf dy() const {
    return {p_.dtype, p_.dy, p_.dy_strides[0], p_.dy_strides[1], routing_.tokens.data()};
  }
  RowsOf inner(const Scratch<S>& rows) const {
    return {kPer == 2 ? DType::kBFloat16 : TokenSums<A>::dtype_of_accumulator(), rows.data(), step_,
            1};
  }

  // body(expert, first column, first row, rows, work): all experts' rows in chunks, times `columns`
  // in blocks.
  template <class Body>
  void each_block(int64_t columns, const Body& body) const {
    const int64_t wide = ceil_div(columns, kWide);
    int64_t tasks = 0;
    for (int64_t e = 0; e < p_.experts; ++e) tasks += count_chunks(e) * wide;
    parallel_tasks(tasks, [&](const auto& claim) {
      const Work work;
      int64_t e = 0, first = 0;  // tasks come in ascending order
      for (int64_t task; (task = claim()) < tasks;) {
        while (task - first >= count_chunks(e) * wide) first += count_chunks(e++) * wide;
        // Chunks of one size, in whole blocks of rows.
        const int64_t count = routing_.offsets[e + 1] - routing_.offsets[e];
        const int64_t chunk = round_up(ceil_div(count, count_chunks(e)), kRows);
        const int64_t row = (task - first) / wide * chunk;
        if (row >= count) continue;
        body(e, (task - first) % wide * kWide, routing_.offsets[e] + row,
             count - row < chunk ? count - row : chunk, work);
      }
    });
  }
  int64_t count_chunks(int64_t e) const {
    return ceil_div(routing_.offsets[e + 1] - routing_.offsets[e], kChunk);
  }

  // work.product[panel][row][L] (+)= left rows times the weights' columns from .. from + columns.
  void product(const RowsOf& left, int64_t row, int64_t rows, const RowsOf& weights, int64_t from,
               int64_t columns, int64_t depth, bool add, const Work& work) const {
    multiply<Order::kByRow>(
        depth / kPer, ceil_div(rows, kRows), columns, kDepth * L, add,
        [&](int64_t k0, int64_t n) {
          pack_lanes(weights, 0, depth, k0, n, from, columns, work.right.data());
          return work.right.data();
        },
        [&](int64_t k0, int64_t n, int64_t block) {
          P* packed = work.left.data() + block * kRows * kDepth;
          pack_rows(left, row + block * kRows, rows - block * kRows, k0, n, packed);
          return packed;
        },
        NothingAhead{}, work.product.data());
  }

  void hidden(int64_t e, int64_t from, int64_t row, int64_t rows, const Work& work) const {
    const int64_t columns = p_.hidden - from < kWide ? p_.hidden - from : kWide;
    product(dy(), row, rows, expert_rows(p_.expert_dtype, p_.down, p_.down_strides, e), from,
            columns, p_.dim, false, work);
    fill_zero(work.gate.data(), kWide);
    fill_zero(work.up.data(), kWide);
    const RowsOf gate{p_.dtype, p_.gate_pre, p_.hidden, 1, routing_.pairs.data()};
    const RowsOf up{p_.dtype, p_.up_pre, p_.hidden, 1, routing_.pairs.data()};
    for (int64_t r = 0; r < rows; ++r) {
      gate.load(row + r, from, columns, work.gate.data());
      up.load(row + r, from, columns, work.up.data());
      const V w(routing_.weights[row + r]), one(A(1));
      const int64_t at = (row + r) * step_ + from;
      V weight_sum;
      for (int64_t i = 0; i < columns; i += N) {
        const V dh = V::load(work.product.data() + at_product(r, i, rows));
        const V g = V::load(work.gate.data() + i), u = V::load(work.up.data() + i);
        const V s = sigmoid(g), silu = g * s, h = silu * u, wdh = w * dh;
        // Lanes past the last column may hold anything; none of them reaches memory that is read.
        weight_sum = columns - i < N ? weight_sum + first_lanes(h * dh, columns - i)
                                     : fma(h, dh, weight_sum);
        (w * h).store(hidden_.data() + at + i);
        (wdh * silu).store(dup_.data() + at + i);
        (wdh * u * s * fma(g, one - s, one)).store(dgate_.data() + at + i);
      }
      dweight_[(row + r) * blocks_ + from / kWide] = weight_sum.sum();
    }
  }
  static int64_t at_product(int64_t row, int64_t column, int64_t rows) {
    return (column / L * round_up(rows, kRows) + row) * L + column % L;
  }
  static V first_lanes(V v, int64_t n) {
    A values[N];
    v.store(values);
    return load_part<V>(values, n);
  }

  void reduce_dweight() const {
    std::memset(p_.dweight, 0, p_.tokens * p_.top_k * size_of(p_.weight_dtype));
    for (int64_t row = 0; row < routing_.rows; ++row) {
      A sum = 0;
      for (int64_t b = 0; b < blocks_; ++b) sum += dweight_[row * blocks_ + b];
      store_row(p_.weight_dtype, p_.dweight, routing_.pairs[row], &sum, A(1), 1);
    }
  }

  void input(int64_t e, int64_t from, int64_t row, int64_t rows, const TokenSums<A>& sums,
             const Work& work) const {
    const int64_t columns = p_.dim - from < kWide ? p_.dim - from : kWide;
    product(inner(dgate_), row, rows, expert_rows(p_.expert_dtype, p_.gate, p_.gate_strides, e),
            from, columns, p_.hidden, false, work);
    product(inner(dup_), row, rows, expert_rows(p_.expert_dtype, p_.up, p_.up_strides, e), from,
            columns, p_.hidden, true, work);
    for (int64_t r = 0; r < rows; ++r) {
      gather(r, columns, rows, work);
      sums.put(row + r, from, work.row.data(), A(1), columns);
    }
  }
  // work.row = row r of work.product
  static void gather(int64_t r, int64_t columns, int64_t rows, const Work& work) {
    for (int64_t i = 0; i < columns; i += N) {
      V::load(work.product.data() + at_product(r, i, rows)).store(work.row.data() + i);
    }
  }

  // out[e] [tall, wide] = sum over the rows of e of left^T right. An expert without rows gets
  // zeros.
  void weights(int64_t tall, int64_t wide, const RowsOf& left, const RowsOf& right,
               void* out) const {
    const int64_t tall_blocks = ceil_div(tall, kTall), wide_blocks = ceil_div(wide, kWide);
    const int64_t tasks = p_.experts * tall_blocks * wide_blocks;
    parallel_tasks(tasks, [&](const auto& claim) {
      const Work work;
      int64_t kept = -1;  // the strip of rows, of all experts, whose left is packed
      for (int64_t task; (task = claim()) < tasks;) {
        const int64_t strip = task / wide_blocks, e = strip / tall_blocks;
        const int64_t top = strip % tall_blocks * kTall, from = task % wide_blocks * kWide;
        const int64_t rows = tall - top < kTall ? tall - top : kTall;
        const int64_t columns = wide - from < kWide ? wide - from : kWide;
        const int64_t begin = routing_.offsets[e], depth = routing_.offsets[e + 1] - begin;
        const bool fits = ceil_div(depth, kPer) <= kKept * kDepth, packed = fits && kept == strip;
        kept = fits ? strip : -1;
        multiply<Order::kByDepth>(
            ceil_div(depth, kPer), ceil_div(rows, kRows), columns, kDepth * L, false,
            [&](int64_t k0, int64_t n) {
              pack_lanes(right, begin, depth, k0, n, from, columns, work.right.data());
              return work.right.data();
            },
            [&](int64_t k0, int64_t n, int64_t block) {
              P* out = work.left.data() + (fits ? k0 * kTall : 0);
              if (block == 0 && !packed) pack_columns(left, begin, depth, k0, n, top, rows, out);
              return out + block * kRows * kDepth;
            },
            NothingAhead{}, work.product.data());
        for (int64_t r = 0; r < rows; ++r) {
          gather(r, columns, rows, work);
          store_row(p_.expert_dtype, out, ((e * tall) + top + r) * wide + from, work.row.data(),
                    A(1), columns);
        }
      }
    });
  }

  const ExpertFfnBackwardParams& p_;
  const Routing<A> routing_;
  const int64_t step_, blocks_;
  Scratch<S> hidden_, dgate_, dup_;  // [rows][step_]
  Scratch<A> dweight_;               // [rows][blocks_]
};

}  // namespace synergen::cpu::SYNERGEN_ISA
