// expert_ffn on the CPU: rows are sorted by expert, then two rounds of matrix products, each one
// parallel region over (expert x block of its columns): gate and up with SwiGLU at the end, then
// down with a scatter at the end.
//
// Rows of an expert are packed as lanes, its weights pass as broadcast rows. An expert with few
// rows takes dot products instead, which read the weights straight from memory, once.
//
// P is the packed number (gemm.h). In pairs, D and F are even and everything is bfloat16, the
// hidden layer between the two rounds too, as in PyTorch.
#pragma once

#include "common/dispatch.h"
#include "cpu/expert_ffn.h"

namespace synergen::cpu::SYNERGEN_ISA {

template <class P>
class ExpertFfnForward {
  using A = Acc<P>;
  using V = VecOf<A>;
  static constexpr int64_t N = V::N, L = kLanes<P>, kPer = kPerPacked<P>;

  // Up to here dot products are faster than packing: 2 x 2048 x 8192 float32 on Zen 5, 2 threads.
  // In pairs, one thread, 8 rows an expert take 10 ms as dot products and 12 packed ones 16.
  static constexpr int64_t kFewRows = 8;
  // Weights of a task: 192 rows (96 of gate and 96 of up, or 192 of down) x 256 x 4 bytes packed
  // are 192 KiB, its results 144 KiB: a third of a second-level cache of 1 MiB. Each panel of
  // activations that comes from further away meets all of them; with 96 rows it was the same within
  // 5 % on Zen 5 (D = 2048, F = 8192, 12 to 256 rows an expert).
  static constexpr int64_t kBlock = 192, kFewBlock = 32;
  static constexpr int64_t kChunk = 192;  // rows of an expert in one task
  // Sorted rows that pass through both rounds together: their hidden layer stays in a third-level
  // cache at the demo's sizes, and reading the weights again for each window costs 3 % at the
  // paper's.
  static constexpr int64_t kWindow = 1024;

  // The rows of one expert within a window.
  struct Segment {
    int64_t expert, begin, rows;
    bool few;
    int64_t x_at, hidden_at;  // where its packed activations start

    int64_t count_chunks() const { return few ? 1 : ceil_div(rows, kChunk); }
  };

  // A segment is padded to whole panels of lanes, or to kFewRows dense rows.
  static constexpr int64_t kPadding = L > kFewRows ? L : kFewRows;

 public:
  explicit ExpertFfnForward(const ExpertFfnParams& p)
      : p_(p),
        routing_(p),
        sums_(p, routing_, p.y),
        window_(ceil_div(routing_.rows, ceil_div(routing_.rows, kWindow) + (routing_.rows == 0))),
        most_segments_(p.experts < window_ ? p.experts : window_),
        segments_(most_segments_ + 1),
        dim_(p.dim / kPer),
        hidden_dim_(p.hidden / kPer),
        x_((window_ + most_segments_ * kPadding) * round_up(dim_, N)),
        hidden_((window_ + most_segments_ * kPadding) * round_up(hidden_dim_, N)) {}

  void run() {
    if (p_.gate_pre && routing_.rows < p_.tokens * p_.top_k) {
      const int64_t bytes = p_.tokens * p_.top_k * p_.hidden * size_of(p_.dtype);
      std::memset(p_.gate_pre, 0, bytes);
      std::memset(p_.up_pre, 0, bytes);
    }
    for (int64_t begin = 0; begin < routing_.rows; begin += window_) {
      cut(begin, begin + window_ < routing_.rows ? begin + window_ : routing_.rows);
      pack();
      each_task(p_.hidden, kBlock / 2,
                [&](const Segment& s, int64_t from, int64_t chunk, const Work& work) {
                  s.few ? few_hidden(s, from, work) : hidden(s, from, chunk, work);
                });
      if (!p_.y) continue;
      each_task(p_.dim, kBlock,
                [&](const Segment& s, int64_t from, int64_t chunk, const Work& work) {
                  s.few ? few_output(s, from, work) : output(s, from, chunk, work);
                });
    }
    if (p_.y) sums_.finish();
  }

 private:
  // A worker's own memory.
  struct Work {
    Scratch<P> packed{kBlock * kDepth};
    Scratch<A> product{kChunk * kBlock};
    Scratch<A> turned{L * kBlock};
  };

  void cut(int64_t begin, int64_t end) {
    const bool dense =
        is_dense(p_.gate_strides) && is_dense(p_.up_strides) && is_dense(p_.down_strides);
    int64_t lanes = 0;
    count_ = 0;
    for (int64_t e = 0; e < p_.experts; ++e) {
      const int64_t from = routing_.offsets[e] > begin ? routing_.offsets[e] : begin;
      const int64_t to = routing_.offsets[e + 1] < end ? routing_.offsets[e + 1] : end;
      if (from >= to) continue;
      const bool few = dense && to - from <= kFewRows;
      segments_[count_++] = {
          e, from, to - from, few, lanes * round_up(dim_, N), lanes * round_up(hidden_dim_, N)};
      lanes += few ? kFewRows : round_up(to - from, L);
    }
  }

  // Rows of a matrix that dot products can read.
  static bool is_dense(const int64_t (&strides)[3]) {
    return strides[2] == 1 && strides[1] % kPer == 0;
  }

  void pack() {
    const RowsOf x{p_.dtype, p_.x, p_.x_strides[0], p_.x_strides[1], routing_.tokens.data()};
    for (int64_t i = 0; i < count_; ++i) {
      const Segment& s = segments_[i];
      P* to = x_.data() + s.x_at;
      if (s.few) {
        const int64_t step = round_up(dim_, N), hidden_step = round_up(hidden_dim_, N);
        fill_zero(to, kFewRows * step);
        fill_zero(hidden_.data() + s.hidden_at, kFewRows * hidden_step);
        for (int64_t r = 0; r < s.rows; ++r) x.load(s.begin + r, 0, dim_, to + r * step);
      } else {
        parallel_for(
            ceil_div(s.rows, L), ceil_div(65536, dim_ * L), [&](int64_t begin, int64_t end) {
              for (int64_t v = begin; v < end; ++v) {
                const int64_t left = s.rows - v * L;
                pack_panel(x, s.begin + v * L, left < L ? left : L, dim_, to + v * dim_ * L);
              }
            });
      }
    }
  }

  // body(segment, first column, first row, work) for every block of `wide` columns of each segment
  // (kFewBlock where it is few); chunks of rows that share weights follow one another.
  template <class Body>
  void each_task(int64_t columns, int64_t wide, const Body& body) const {
    const auto width = [&](const Segment& s) { return s.few ? kFewBlock : wide; };
    const auto count_tasks = [&](const Segment& s) {
      return ceil_div(columns, width(s)) * s.count_chunks();
    };
    int64_t tasks = 0;
    for (int64_t i = 0; i < count_; ++i) tasks += count_tasks(segments_[i]);
    parallel_tasks(tasks, [&](const auto& claim) {
      const Work work;
      int64_t i = 0, first = 0;  // tasks come in ascending order
      for (int64_t task; (task = claim()) < tasks;) {
        while (task - first >= count_tasks(segments_[i])) first += count_tasks(segments_[i++]);
        const Segment& s = segments_[i];
        const int64_t block = (task - first) / s.count_chunks();
        const int64_t chunk = (task - first) % s.count_chunks();
        body(s, block * width(s), chunk * kChunk, work);
      }
    });
  }

  // work.product[panel][row block][L] for rows chunk .. chunk + kChunk of a segment, whose packed
  // activations are given, and rows from .. from + columns of each matrix, padded to whole blocks.
  template <int Count>
  void product(const RowsOf (&weights)[Count], const Segment& s, const P* packed, int64_t depth,
               int64_t from, int64_t columns, int64_t chunk, const Work& work) const {
    const int64_t lanes = s.rows - chunk < kChunk ? s.rows - chunk : kChunk;
    const int64_t padded = round_up(columns, kRows);
    const P* v = packed + chunk * depth;
    const int64_t blocks = padded / kRows;  // of one matrix
    const auto ahead = [&](int64_t k0, int64_t block, int64_t k) {
      // At the end the next task's first rows, which may be another worker's.
      const int64_t row = from + (k0 < depth ? block % blocks * kRows : columns);
      weights[block / blocks].template prefetch<P>(row, k0 < depth ? k0 + k : k);
    };
    multiply<Order::kByRow>(
        depth, Count * blocks, lanes, depth * L, false,
        [&](int64_t k0, int64_t) { return v + k0 * L; },
        [&](int64_t k0, int64_t n, int64_t block) {
          P* out = work.packed.data() + block * kRows * kDepth;
          const int64_t row = block % blocks * kRows;
          pack_rows(weights[block / blocks], from + row, columns - row, k0, n, out);
          return out;
        },
        ahead, work.product.data());
  }

  void hidden(const Segment& s, int64_t from, int64_t chunk, const Work& work) const {
    const int64_t columns = p_.hidden - from < kBlock / 2 ? p_.hidden - from : kBlock / 2;
    const int64_t padded = round_up(columns, kRows);
    const int64_t end = s.rows - chunk < kChunk ? s.rows - chunk : kChunk;
    product({expert_rows(p_.expert_dtype, p_.gate, p_.gate_strides, s.expert),
             expert_rows(p_.expert_dtype, p_.up, p_.up_strides, s.expert)},
            s, x_.data() + s.x_at, dim_, from, columns, chunk, work);
    for (int64_t lane = 0; lane < end; lane += L) {
      const A* gate = work.product.data() + lane * 2 * padded;
      const A* up = gate + padded * L;
      const int64_t lanes = end - lane < L ? end - lane : L;
      P* out = hidden_.data() + s.hidden_at + (chunk + lane) * hidden_dim_ + from / kPer * L;
      const auto swiglu = [&](int64_t i) {
        const V g = V::load(gate + i);
        return g * sigmoid(g) * V::load(up + i);
      };
      for (int64_t i = 0; i < columns; i += kPer) {
        for (int64_t j = 0; j < lanes; j += N) {
          P* to = out + i / kPer * L + j;
          if constexpr (kPer == 2) {
            store_pairs(swiglu(i * L + j), swiglu((i + 1) * L + j), to);
          } else {
            swiglu(i * L + j).store(to);
          }
        }
      }
      if (p_.gate_pre) {
        save(s.begin + chunk + lane, from, gate, columns, lanes, work, p_.gate_pre);
        save(s.begin + chunk + lane, from, up, columns, lanes, work, p_.up_pre);
      }
    }
  }

  void save(int64_t row, int64_t from, const A* values, int64_t columns, int64_t lanes,
            const Work& work, void* out) const {
    turn_panel(values, columns, lanes, work.turned.data(), kBlock);
    for (int64_t r = 0; r < lanes; ++r) {
      store_row(p_.dtype, out, routing_.pairs[row + r] * p_.hidden + from,
                work.turned.data() + r * kBlock, A(1), columns);
    }
  }

  void output(const Segment& s, int64_t from, int64_t chunk, const Work& work) const {
    const int64_t columns = p_.dim - from < kBlock ? p_.dim - from : kBlock;
    const int64_t end = s.rows - chunk < kChunk ? s.rows - chunk : kChunk;
    product({expert_rows(p_.expert_dtype, p_.down, p_.down_strides, s.expert)}, s,
            hidden_.data() + s.hidden_at, hidden_dim_, from, columns, chunk, work);
    for (int64_t lane = 0; lane < end; lane += L) {
      const int64_t lanes = end - lane < L ? end - lane : L;
      turn_panel(work.product.data() + lane * round_up(columns, kRows), columns, lanes,
                 work.turned.data(), kBlock);
      for (int64_t r = 0; r < lanes; ++r) {
        const int64_t row = s.begin + chunk + lane + r;
        sums_.put(row, from, work.turned.data() + r * kBlock, routing_.weights[row], columns);
      }
    }
  }

  // out[row][kFewBlock] = the segment's dense rows times rows from .. from + columns of the
  // weights.
  void few_product(const RowsOf& weights, const Segment& s, const P* rows, int64_t depth,
                   int64_t from, int64_t columns, A* out) const {
    const auto few = [&](auto tag) {
      using W = typename decltype(tag)::type;
      const W* w = reinterpret_cast<const W*>(weights.at(from, 0));
      const auto dot = [&](auto dots) {
        dots(rows, round_up(depth, N), w, weights.row_stride / kPer, columns, depth, out,
             kFewBlock);
      };
      if (s.rows == 1) {
        dot(dot_rows<1, P, W>);
      } else if (s.rows == 2) {
        dot(dot_rows<2, P, W>);
      } else if (s.rows <= 4) {
        dot(dot_rows<4, P, W>);
      } else {
        dot(dot_rows<8, P, W>);
      }
    };
    if constexpr (kPer == 2) {
      few(Type<P>{});
    } else {
      dispatch_float(weights.dtype, [&](auto tag) {
        using W = typename decltype(tag)::type;
        if constexpr (std::is_same_v<A, float> != std::is_same_v<W, double> ||
                      std::is_same_v<W, float>) {
          few(tag);
        }
      });
    }
  }

  void few_hidden(const Segment& s, int64_t from, const Work& work) const {
    const int64_t columns = p_.hidden - from < kFewBlock ? p_.hidden - from : kFewBlock;
    const P* x = x_.data() + s.x_at;
    few_product(expert_rows(p_.expert_dtype, p_.gate, p_.gate_strides, s.expert), s, x, dim_, from,
                columns, work.product.data());
    few_product(expert_rows(p_.expert_dtype, p_.up, p_.up_strides, s.expert), s, x, dim_, from,
                columns, work.product.data() + kFewRows * kFewBlock);
    for (int64_t r = 0; r < s.rows; ++r) {
      A* gate = work.product.data() + r * kFewBlock;
      A* up = work.product.data() + kFewRows * kFewBlock + r * kFewBlock;
      const int64_t at = s.hidden_at + r * round_up(hidden_dim_, N);
      auto* out = reinterpret_cast<Element<P>*>(hidden_.data() + at) + from;
      if (p_.gate_pre) {
        const int64_t offset = routing_.pairs[s.begin + r] * p_.hidden + from;
        store_row(p_.dtype, p_.gate_pre, offset, gate, A(1), columns);
        store_row(p_.dtype, p_.up_pre, offset, up, A(1), columns);
      }
      for (int64_t i = 0; i < columns; i += N) {
        const int64_t n = columns - i < N ? columns - i : N;
        const V g = load_part<V>(gate + i, n);
        store_part(g * sigmoid(g) * load_part<V>(up + i, n), out + i, n);
      }
    }
  }

  void few_output(const Segment& s, int64_t from, const Work& work) const {
    const int64_t columns = p_.dim - from < kFewBlock ? p_.dim - from : kFewBlock;
    few_product(expert_rows(p_.expert_dtype, p_.down, p_.down_strides, s.expert), s,
                hidden_.data() + s.hidden_at, hidden_dim_, from, columns, work.product.data());
    for (int64_t r = 0; r < s.rows; ++r) {
      const int64_t row = s.begin + r;
      sums_.put(row, from, work.product.data() + r * kFewBlock, routing_.weights[row], columns);
    }
  }

  const ExpertFfnParams& p_;
  const Routing<A> routing_;
  const TokenSums<A> sums_;
  const int64_t window_, most_segments_;
  Scratch<Segment> segments_;
  int64_t count_ = 0;
  const int64_t dim_, hidden_dim_;  // of packed numbers
  Scratch<P> x_, hidden_;
};

}  // namespace synergen::cpu::SYNERGEN_ISA
