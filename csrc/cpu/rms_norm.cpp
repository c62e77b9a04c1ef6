// rms_norm on the CPU: one pass for the mean square, one to scale; a row stays in the first-level cache between them.
#include <cmath>

#include "common/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/vec.h"
#include "kernels.h"

namespace synergen::cpu::SYNERGEN_ISA {
namespace {

// 1 / sqrt(mean(x^2) + eps)
template <class A>
A inverse_rms(const A* x, int64_t dim, double eps) {
  using V = VecOf<A>;
  V s0, s1;
  int64_t i = 0;
  for (; i + 2 * V::N <= dim; i += 2 * V::N) {
    const V a = V::load(x + i), b = V::load(x + i + V::N);
    s0 = fma(a, a, s0);
    s1 = fma(b, b, s1);
  }
  A sum = (s0 + s1).sum();
  for (; i < dim; ++i) sum += x[i] * x[i];
  return static_cast<A>(1) / std::sqrt(sum / static_cast<A>(dim) + static_cast<A>(eps));
}

template <class T>
void forward(const RmsNormParams& p) {
  using A = Acc<T>;
  using V = VecOf<T>;
  Scratch<A> weight(p.dim);
  load_row(p.weight_dtype, p.weight, p.weight_stride, p.dim, weight.data());
  // 16 k elements a thread: below that, starting a thread costs more than the work.
  parallel_for(p.rows, ceil_div(16384, p.dim), [&](int64_t begin, int64_t end) {
    Scratch<A> x(p.dim);
    for (int64_t row = begin; row < end; ++row) {
      load_row(static_cast<const T*>(p.x) + p.x_rows.offset(row), p.x_stride, p.dim, x.data());
      const A scale = inverse_rms(x.data(), p.dim, p.eps);
      T* y = static_cast<T*>(p.y) + row * p.dim;
      int64_t i = 0;
      for (; i + V::N <= p.dim; i += V::N) {
        (V::load(x.data() + i) * V(scale) * V::load(weight.data() + i)).store(y + i);
      }
      for (; i < p.dim; ++i) from_float(x[i] * scale * weight[i], y[i]);
    }
  });
}

}  // namespace

void rms_norm(const RmsNormParams& p) {
  dispatch_float(p.dtype, [&](auto tag) { forward<typename decltype(tag)::type>(p); });
}

}  // namespace synergen::cpu::SYNERGEN_ISA
