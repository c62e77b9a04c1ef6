// expert_ffn on the CPU: rows are sorted by expert, then two rounds of matrix products, each one
// parallel region over (expert x block of its columns): gate and up with SwiGLU at the end, then
// down with a scatter at the end.
//
// Rows of an expert are packed as lanes, its weights pass as broadcast rows. An expert with few
// rows takes dot products instead, which read the weights straight from memory, once.
#pragma once

#include "common/dispatch.h"
#include "cpu/expert_ffn.h"

namespace synergen::cpu::SYNERGEN_ISA {

template <class A>
class ExpertFfnForward {
  using V = VecOf<A>;
  static constexpr int64_t N = V::N, L = kLanes<A>;

  // Up to here dot products are faster than packing: 2 x 2048 x 8192 float32 on Zen 5, 2 threads.
  static constexpr int64_t kFewRows = 8;
  // Weights of a task: 96 rows x 256 x 4 bytes packed is 96 KiB, and as much for its results: half
  // a second-level cache.
  static constexpr int64_t kBlock = 96, kFewBlock = 32;
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

    int64_t count_tasks(int64_t columns) const {
      return few ? ceil_div(columns, kFewBlock)
                 : ceil_div(columns, kBlock) * ceil_div(rows, kChunk);
    }
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
        x_((window_ + most_segments_ * kPadding) * round_up(p.dim, N)),
        hidden_((window_ + most_segments_ * kPadding) * round_up(p.hidden, N)) {}

  void run() {
    if (p_.gate_pre && routing_.rows < p_.tokens * p_.top_k) {
      const int64_t bytes = p_.tokens * p_.top_k * p_.hidden * size_of(p_.dtype);
      std::memset(p_.gate_pre, 0, bytes);
      std::memset(p_.up_pre, 0, bytes);
    }
    for (int64_t begin = 0; begin < routing_.rows; begin += window_) {
      cut(begin, begin + window_ < routing_.rows ? begin + window_ : routing_.rows);
      pack();
      each_task(p_.hidden, [&](const Segment& s, int64_t from, int64_t chunk, const Work& work) {
        s.few ? few_hidden(s, from, work) : hidden(s, from, chunk, work);
      });
      if (!p_.y) continue;
      each_task(p_.dim, [&](const Segment& s, int64_t from, int64_t chunk, const Work& work) {
        s.few ? few_output(s, from, work) : output(s, from, chunk, work);
      });
    }
    if (p_.y) sums_.finish();
  }

 private:
  // A worker's own memory.
  struct Work {
    Scratch<A> packed{kBlock * kDepth};
    Scratch<A> gate{kChunk * kBlock}, up{kChunk * kBlock};
    Scratch<A> turned{L * kBlock};
  };

  void cut(int64_t begin, int64_t end) {
    const bool dense = p_.gate_strides[2] == 1 && p_.up_strides[2] == 1 && p_.down_strides[2] == 1;
    int64_t lanes = 0;
    count_ = 0;
    for (int64_t e = 0; e < p_.experts; ++e) {
      const int64_t from = routing_.offsets[e] > begin ? routing_.offsets[e] : begin;
      const int64_t to = routing_.offsets[e + 1] < end ? routing_.offsets[e + 1] : end;
      if (from >= to) continue;
      const bool few = dense && to - from <= kFewRows;
      segments_[count_++] = {
          e, from, to - from, few, lanes * round_up(p_.dim, N), lanes * round_up(p_.hidden, N)};
      lanes += few ? kFewRows : round_up(to - from, L);
    }
  }

  void pack() {
    const RowsOf x{p_.dtype, p_.x, p_.x_strides[0], p_.x_strides[1], routing_.tokens.data()};
    for (int64_t i = 0; i < count_; ++i) {
      const Segment& s = segments_[i];
      A* to = x_.data() + s.x_at;
      if (s.few) {
        const int64_t step = round_up(p_.dim, N), hidden_step = round_up(p_.hidden, N);
        fill_zero(to, kFewRows * step);
        fill_zero(hidden_.data() + s.hidden_at, kFewRows * hidden_step);
        for (int64_t r = 0; r < s.rows; ++r) x.load(s.begin + r, 0, p_.dim, to + r * step);
      } else {
        parallel_for(
            ceil_div(s.rows, L), ceil_div(65536, p_.dim * L), [&](int64_t begin, int64_t end) {
              for (int64_t v = begin; v < end; ++v) {
                const int64_t left = s.rows - v * L;
                pack_panel(x, s.begin + v * L, left < L ? left : L, p_.dim, to + v * p_.dim * L);
              }
            });
      }
    }
  }

  // body(segment, first column, first row, work) for every block of `columns` columns.
  template <class Body>
  void each_task(int64_t columns, const Body& body) const {
    int64_t tasks = 0;
    for (int64_t i = 0; i < count_; ++i) tasks += segments_[i].count_tasks(columns);
    parallel_tasks(tasks, [&](const auto& claim) {
      const Work work;
      int64_t i = 0, first = 0;  // tasks come in ascending order
      for (int64_t task; (task = claim()) < tasks;) {
        while (task - first >= segments_[i].count_tasks(columns))
          first += segments_[i++].count_tasks(columns);
        const int64_t blocks = ceil_div(columns, segments_[i].few ? kFewBlock : kBlock);
        const int64_t block = (task - first) % blocks, chunk = (task - first) / blocks;
        body(segments_[i], block * (segments_[i].few ? kFewBlock : kBlock), chunk * kChunk, work);
      }
    });
  }

  // out[panel][column][L] for rows chunk .. chunk + kChunk of a segment, whose packed activations
  // are given.
  void product(const RowsOf& weights, const Segment& s, const A* packed, int64_t depth,
               int64_t from, int64_t columns, int64_t chunk, const Work& work, A* out) const {
    const int64_t lanes = s.rows - chunk < kChunk ? s.rows - chunk : kChunk;
    multiply<Order::kByRow>(
        depth, ceil_div(columns, kRows), lanes, depth * L, false,
        [&](int64_t k0, int64_t) { return packed + (chunk * depth + k0 * L); },
        [&](int64_t k0, int64_t n) {
          pack_rows(weights, from, columns, k0, n, work.packed.data());
          return work.packed.data();
        },
        out);
  }

  void hidden(const Segment& s, int64_t from, int64_t chunk, const Work& work) const {
    const int64_t columns = p_.hidden - from < kBlock ? p_.hidden - from : kBlock;
    const int64_t padded = round_up(columns, kRows);
    const int64_t end = s.rows - chunk < kChunk ? s.rows - chunk : kChunk;
    const A* x = x_.data() + s.x_at;
    product(expert_rows(p_.expert_dtype, p_.gate, p_.gate_strides, s.expert), s, x, p_.dim, from,
            columns, chunk, work, work.gate.data());
    product(expert_rows(p_.expert_dtype, p_.up, p_.up_strides, s.expert), s, x, p_.dim, from,
            columns, chunk, work, work.up.data());
    for (int64_t lane = 0; lane < end; lane += L) {
      const A* gate = work.gate.data() + lane * padded;
      const A* up = work.up.data() + lane * padded;
      const int64_t lanes = end - lane < L ? end - lane : L;
      A* out = hidden_.data() + s.hidden_at + (chunk + lane) * p_.hidden + from * L;
      for (int64_t i = 0; i < columns * L; i += L) {
        for (int64_t j = 0; j < lanes; j += N) {
          const V g = V::load(gate + i + j);
          (g * sigmoid(g) * V::load(up + i + j)).store(out + i + j);
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
    product(expert_rows(p_.expert_dtype, p_.down, p_.down_strides, s.expert), s,
            hidden_.data() + s.hidden_at, p_.hidden, from, columns, chunk, work, work.gate.data());
    for (int64_t lane = 0; lane < end; lane += L) {
      const int64_t lanes = end - lane < L ? end - lane : L;
      turn_panel(work.gate.data() + lane * round_up(columns, kRows), columns, lanes,
                 work.turned.data(), kBlock);
      for (int64_t r = 0; r < lanes; ++r) {
        const int64_t row = s.begin + chunk + lane + r;
        sums_.put(row, from, work.turned.data() + r * kBlock, routing_.weights[row], columns);
      }
    }
  }

  // out[row][kFewBlock] = the segment's dense rows times rows from .. from + columns of the
  // weights.
  void few_product(const RowsOf& weights, const Segment& s, const A* rows, int64_t depth,
                   int64_t from, int64_t columns, A* out) const {
    dispatch_float(weights.dtype, [&](auto tag) {
      using W = typename decltype(tag)::type;
      if constexpr (std::is_same_v<A, float> != std::is_same_v<W, double> ||
                    std::is_same_v<W, float>) {
        const W* w = reinterpret_cast<const W*>(weights.at(from, 0));
        const int64_t step = round_up(depth, N);
        const auto dot = [&](auto dots) {
          dots(rows, step, w, weights.row_stride, columns, depth, out, kFewBlock);
        };
        if (s.rows == 1) {
          dot(dot_rows<1, A, W>);
        } else if (s.rows == 2) {
          dot(dot_rows<2, A, W>);
        } else if (s.rows <= 4) {
          dot(dot_rows<4, A, W>);
        } else {
          dot(dot_rows<8, A, W>);
        }
      }
    });
  }

  void few_hidden(const Segment& s, int64_t from, const Work& work) const {
    const int64_t columns = p_.hidden - from < kFewBlock ? p_.hidden - from : kFewBlock;
    const A* x = x_.data() + s.x_at;
    few_product(expert_rows(p_.expert_dtype, p_.gate, p_.gate_strides, s.expert), s, x, p_.dim,
                from, columns, work.gate.data());
    few_product(expert_rows(p_.expert_dtype, p_.up, p_.up_strides, s.expert), s, x, p_.dim, from,
                columns, work.up.data());
    for (int64_t r = 0; r < s.rows; ++r) {
      A* gate = work.gate.data() + r * kFewBlock;
      A* up = work.up.data() + r * kFewBlock;
      A* out = hidden_.data() + s.hidden_at + r * round_up(p_.hidden, N) + from;
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
                hidden_.data() + s.hidden_at, p_.hidden, from, columns, work.gate.data());
    for (int64_t r = 0; r < s.rows; ++r) {
      const int64_t row = s.begin + r;
      sums_.put(row, from, work.gate.data() + r * kFewBlock, routing_.weights[row], columns);
    }
  }

  const ExpertFfnParams& p_;
  const Routing<A> routing_;
  const TokenSums<A> sums_;
  const int64_t window_, most_segments_;
  Scratch<Segment> segments_;
  int64_t count_ = 0;
  Scratch<A> x_, hidden_;
};

}  // namespace synergen::cpu::SYNERGEN_ISA
