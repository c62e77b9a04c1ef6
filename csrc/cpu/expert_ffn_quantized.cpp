// expert_ffn_quantized on the CPU: each row of weights becomes float (or double) once and meets all
// rows of its expert; columns are split over threads.
#include "common/dispatch.h"
#include "cpu/expert_ffn.h"

namespace synergen::cpu::SYNERGEN_ISA {
namespace {

// One of gate, up and down.
struct Quantised {
  bool nibbles;
  DType dtype;  // of the scales
  const void *data, *scale;
  const int64_t (&strides)[3], (&scale_strides)[3];
  int64_t group;

  // Row `row` of expert e, as numbers.
  template <class A>
  void load(int64_t e, int64_t row, int64_t columns, A* out) const {
    const int8_t* bytes = static_cast<const int8_t*>(data) + e * strides[0] + row * strides[1];
    const RowsOf scales = expert_rows(dtype, scale, scale_strides, e);
    for (int64_t begin = 0; begin < columns; begin += group) {
      A by;
      scales.load(row, begin / group, 1, &by);
      for (int64_t i = begin; i < begin + group; ++i) out[i] = static_cast<A>(value(bytes, i)) * by;
    }
  }

 private:
  int value(const int8_t* bytes, int64_t i) const {
    if (!nibbles) return bytes[i * strides[2]];
    const int64_t place = i % 2 * 4 + i % 8 / 2;  // of 8 in 4 bytes: even columns, then odd ones
    const uint8_t both = static_cast<uint8_t>(bytes[(i / 8 * 4 + place / 2) * strides[2]]);
    return (both >> (place % 2 * 4) & 15) - 8;
  }
};

template <class A>
A dot(const A* x, const A* w, int64_t n) {
  using V = VecOf<A>;
  V sum;
  for (int64_t i = 0; i < n; i += V::N) sum = fma(V::load(x + i), V::load(w + i), sum);
  return sum.sum();
}

template <class A>
void run(const ExpertFfnQuantizedParams& p) {
  using V = VecOf<A>;
  const Routing<A> routing(p);
  const TokenSums<A> sums(p, routing, p.y);
  const bool nibbles = p.expert_dtype == DType::kUInt8;
  const Quantised gate{
      nibbles, p.dtype, p.gate, p.gate_scale, p.gate_strides, p.gate_scale_strides, p.gate_group};
  const Quantised up{nibbles,     p.dtype, p.up, p.up_scale, p.up_strides, p.up_scale_strides,
                     p.gate_group};
  const Quantised down{
      nibbles, p.dtype, p.down, p.down_scale, p.down_strides, p.down_scale_strides, p.down_group};
  const int64_t dim = round_up(p.dim, V::N), hidden_dim = round_up(p.hidden, V::N);
  Scratch<A> x(routing.rows * dim), hidden(routing.rows * hidden_dim);
  fill_zero(x.data(), routing.rows * dim);
  fill_zero(hidden.data(), routing.rows * hidden_dim);
  const RowsOf tokens{p.dtype, p.x, p.x_strides[0], p.x_strides[1], routing.tokens.data()};
  for (int64_t r = 0; r < routing.rows; ++r) tokens.load(r, 0, p.dim, x.data() + r * dim);

  parallel_for(p.hidden, 1, [&](int64_t begin, int64_t end) {
    Scratch<A> g(dim), u(dim);
    fill_zero(g.data(), dim);
    fill_zero(u.data(), dim);
    for (int64_t e = 0; e < p.experts; ++e) {
      if (routing.offsets[e] == routing.offsets[e + 1]) continue;
      for (int64_t f = begin; f < end; ++f) {
        gate.load(e, f, p.dim, g.data());
        up.load(e, f, p.dim, u.data());
        for (int64_t r = routing.offsets[e]; r < routing.offsets[e + 1]; ++r) {
          const A s = dot(x.data() + r * dim, g.data(), dim);
          hidden[r * hidden_dim + f] =
              s / (1 + std::exp(-s)) * dot(x.data() + r * dim, u.data(), dim);
        }
      }
    }
  });
  parallel_for(p.dim, 1, [&](int64_t begin, int64_t end) {
    Scratch<A> d(hidden_dim);
    fill_zero(d.data(), hidden_dim);
    for (int64_t e = 0; e < p.experts; ++e) {
      if (routing.offsets[e] == routing.offsets[e + 1]) continue;
      for (int64_t i = begin; i < end; ++i) {
        down.load(e, i, p.hidden, d.data());
        for (int64_t r = routing.offsets[e]; r < routing.offsets[e + 1]; ++r) {
          const A value = dot(hidden.data() + r * hidden_dim, d.data(), hidden_dim);
          sums.put(r, i, &value, routing.weights[r], 1);
        }
      }
    }
  });
  sums.finish();
}

}  // namespace

void expert_ffn_quantized(const ExpertFfnQuantizedParams& p) {
  if (p.dtype == DType::kFloat64) {
    run<double>(p);
  } else {
    run<float>(p);
  }
}

}  // namespace synergen::cpu::SYNERGEN_ISA
