// rope on the CPU: sines and cosines once per distinct position, then every head of a token is
// rotated with them.
#include <cmath>

#include "common/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/rotate.h"
#include "cpu/scratch.h"
#include "kernels.h"

namespace synergen::cpu::SYNERGEN_ISA {
namespace {

// Angles are computed in double: at position 32768 a float32 angle is off by up to 2e-3, in
// bfloat16 it is noise.
template <class A>
void fill_angles(const RopeParams& p, const double* frequency, int64_t position, A* cosines,
                 A* sines) {
  for (int64_t i = 0; i < p.dim / 2; ++i) {
    const double angle = static_cast<double>(position) * frequency[i];
    cosines[i] = static_cast<A>(std::cos(angle));
    sines[i] = static_cast<A>(p.inverse ? -std::sin(angle) : std::sin(angle));
  }
}

template <class T, class A>
void rotate(const RopeParams::Part& part, int64_t token, int64_t dim, const A* cosines,
            const A* sines, A* x) {
  const T* from = static_cast<const T*>(part.x) + part.rows.offset(token);
  for (int64_t head = 0; head < part.heads; ++head) {
    load_row(from + head * part.head_stride, part.stride, dim, x);
    rotate_head(x, dim / 2, cosines, sines,
                static_cast<T*>(part.y) + (token * part.heads + head) * dim);
  }
}

template <class T>
void run(const RopeParams& p) {
  using A = Acc<T>;
  const int64_t half = p.dim / 2;
  Scratch<double> frequency(half);
  for (int64_t i = 0; i < half; ++i) {
    frequency[i] = std::pow(p.theta, -2.0 * static_cast<double>(i) / static_cast<double>(p.dim));
  }
  // A sine costs as much as rotating a head. A batch repeats its positions, so where the range of
  // positions is no longer than the tokens they are tabled once.
  int64_t low = p.positions[p.position_rows.offset(0)], high = low;
  for (int64_t t = 1; t < p.tokens; ++t) {
    const int64_t position = p.positions[p.position_rows.offset(t)];
    low = position < low ? position : low;
    high = position > high ? position : high;
  }
  const uint64_t range = static_cast<uint64_t>(high) - static_cast<uint64_t>(low);
  const bool tabled = range < static_cast<uint64_t>(p.tokens);
  const int64_t distinct = tabled ? static_cast<int64_t>(range) + 1 : 0;
  Scratch<A> table(distinct * p.dim);
  parallel_for(distinct, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      A* row = table.data() + i * p.dim;
      fill_angles(p, frequency.data(), low + i, row, row + half);
    }
  });
  const int64_t work = p.dim * (p.parts[0].heads + p.parts[1].heads) + 1;
  parallel_for(p.tokens, ceil_div(16384, work), [&](int64_t begin, int64_t end) {
    Scratch<A> own(p.dim), x(p.dim);
    for (int64_t token = begin; token < end; ++token) {
      const int64_t position = p.positions[p.position_rows.offset(token)];
      A* row = tabled ? table.data() + (position - low) * p.dim : own.data();
      if (!tabled) fill_angles(p, frequency.data(), position, row, row + half);
      for (const RopeParams::Part& part : p.parts)
        rotate<T>(part, token, p.dim, row, row + half, x.data());
    }
  });
}

}  // namespace

void rope(const RopeParams& p) {
  dispatch_float(p.dtype, [&](auto tag) { run<typename decltype(tag)::type>(p); });
}

}  // namespace synergen::cpu::SYNERGEN_ISA
