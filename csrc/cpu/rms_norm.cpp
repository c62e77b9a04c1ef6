// rms_norm and add_rms_norm on the CPU: each row is widened into a buffer that stays in the
// first-level cache, then summed and scaled.
#include <cmath>

#include "common/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/vec.h"
#include "kernels.h"

namespace synergen::cpu::SYNERGEN_ISA {
namespace {

// 16 k elements a thread: below that, waking a thread costs more than the work.
constexpr int64_t kGrain = 16384;

// sum of a[i] * b[i]
template <class A>
A dot(const A* a, const A* b, int64_t n) {
  using V = VecOf<A>;
  V s0, s1;
  int64_t i = 0;
  for (; i + 2 * V::N <= n; i += 2 * V::N) {
    s0 = fma(V::load(a + i), V::load(b + i), s0);
    s1 = fma(V::load(a + i + V::N), V::load(b + i + V::N), s1);
  }
  A sum = (s0 + s1).sum();
  for (; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

template <class A>
A inverse_rms(const A* x, const RmsNormParams& p) {
  return static_cast<A>(1) /
         std::sqrt(dot(x, x, p.dim) / static_cast<A>(p.dim) + static_cast<A>(p.eps));
}

// The row to be normalised, widened.
template <class T>
void load_input(const RmsNormParams& p, int64_t row, Acc<T>* x, Acc<T>*) {
  load_row(static_cast<const T*>(p.x) + p.x_rows.offset(row), p.x_stride, p.dim, x);
}

// The same where it is a sum, which is rounded on its way through memory.
template <class T>
void load_input(const AddRmsNormParams& p, int64_t row, Acc<T>* x, Acc<T>* residual) {
  using V = VecOf<T>;
  T* sum = static_cast<T*>(p.sum) + row * p.dim;
  load_row(static_cast<const T*>(p.x) + p.x_rows.offset(row), p.x_stride, p.dim, x);
  load_row(static_cast<const T*>(p.residual) + p.residual_rows.offset(row), p.residual_stride,
           p.dim, residual);
  int64_t i = 0;
  for (; i + V::N <= p.dim; i += V::N) (V::load(x + i) + V::load(residual + i)).store(sum + i);
  for (; i < p.dim; ++i) from_float(x[i] + residual[i], sum[i]);
  load_row(sum, 1, p.dim, x);
}

template <class T, class P>
void forward(const P& p) {
  using A = Acc<T>;
  using V = VecOf<T>;
  Scratch<A> weight(p.dim);
  load_row(p.weight_dtype, p.weight, p.weight_stride, p.dim, weight.data());
  parallel_for(p.rows, ceil_div(kGrain, p.dim), [&](int64_t begin, int64_t end) {
    Scratch<A> x(p.dim), residual(p.dim);
    for (int64_t row = begin; row < end; ++row) {
      load_input<T>(p, row, x.data(), residual.data());
      const A scale = inverse_rms(x.data(), p);
      T* y = static_cast<T*>(p.y) + row * p.dim;
      int64_t i = 0;
      for (; i + V::N <= p.dim; i += V::N) {
        (V::load(x.data() + i) * V(scale) * V::load(weight.data() + i)).store(y + i);
      }
      for (; i < p.dim; ++i) from_float(x[i] * scale * weight[i], y[i]);
    }
  });
}

// With r = 1 / sqrt(mean(x^2) + eps):
//   dx = r * dy * weight - r^3 * x * mean(dy * weight * x),   dweight = sum over rows of dy * x *
//   r;
// where x was a sum, its own gradient comes on top of dx.
// Rows are summed in at most 64 pieces, then the pieces in order: the result does not depend on the
// thread count.
template <class T, class P>
void backward(const P& p) {
  using A = Acc<T>;
  using V = VecOf<T>;
  constexpr bool kSum = std::is_same_v<P, AddRmsNormBackwardParams>;
  const int64_t dim = p.dim, pieces = p.rows < 64 ? p.rows : 64;
  Scratch<A> weight(dim), partial(pieces * dim);
  load_row(p.weight_dtype, p.weight, p.weight_stride, dim, weight.data());
  const int64_t rows_per_piece = pieces ? ceil_div(p.rows, pieces) : 0;
  parallel_for(
      pieces, ceil_div(kGrain, dim * (rows_per_piece + 1)), [&](int64_t begin, int64_t end) {
        Scratch<A> x(dim), dy(dim), dsum(kSum ? dim : 0);
        for (int64_t piece = begin; piece < end; ++piece) {
          A* sum = partial.data() + piece * dim;
          for (int64_t i = 0; i < dim; ++i) sum[i] = 0;
          const int64_t last = p.rows * (piece + 1) / pieces;
          for (int64_t row = p.rows * piece / pieces; row < last; ++row) {
            load_row(static_cast<const T*>(p.x) + p.x_rows.offset(row), p.x_stride, dim, x.data());
            load_row(static_cast<const T*>(p.dy) + p.dy_rows.offset(row), p.dy_stride, dim,
                     dy.data());
            if constexpr (kSum) {
              load_row(static_cast<const T*>(p.dsum) + p.dsum_rows.offset(row), p.dsum_stride, dim,
                       dsum.data());
            }
            const A r = inverse_rms(x.data(), p);
            int64_t i = 0;
            for (; i + V::N <= dim; i += V::N) {
              const V d = V::load(dy.data() + i);
              fma(d * V::load(x.data() + i), V(r), V::load(sum + i)).store(sum + i);
              (d * V::load(weight.data() + i)).store(dy.data() + i);
            }
            for (; i < dim; ++i) {
              sum[i] += dy[i] * x[i] * r;
              dy[i] *= weight[i];
            }
            const A slope = dot(dy.data(), x.data(), dim) / static_cast<A>(dim) * r * r;
            T* dx = static_cast<T*>(p.dx) + row * dim;
            for (i = 0; i + V::N <= dim; i += V::N) {
              V d = (V::load(dy.data() + i) - V::load(x.data() + i) * V(slope)) * V(r);
              if constexpr (kSum) d = d + V::load(dsum.data() + i);
              d.store(dx + i);
            }
            for (; i < dim; ++i) {
              A d = (dy[i] - x[i] * slope) * r;
              if constexpr (kSum) d += dsum[i];
              from_float(d, dx[i]);
            }
          }
        }
      });
  Scratch<A> total(dim);
  for (int64_t i = 0; i < dim; ++i) total[i] = 0;
  for (int64_t piece = 0; piece < pieces; ++piece) {
    for (int64_t i = 0; i < dim; ++i) total[i] += partial[piece * dim + i];
  }
  store_row(total.data(), dim, p.weight_dtype, p.dweight);
}

}  // namespace

void rms_norm(const RmsNormParams& p) {
  dispatch_float(p.dtype, [&](auto tag) { forward<typename decltype(tag)::type>(p); });
}

void rms_norm_backward(const RmsNormBackwardParams& p) {
  dispatch_float(p.dtype, [&](auto tag) { backward<typename decltype(tag)::type>(p); });
}

void add_rms_norm(const AddRmsNormParams& p) {
  dispatch_float(p.dtype, [&](auto tag) { forward<typename decltype(tag)::type>(p); });
}

void add_rms_norm_backward(const AddRmsNormBackwardParams& p) {
  dispatch_float(p.dtype, [&](auto tag) { backward<typename decltype(tag)::type>(p); });
}

}  // namespace synergen::cpu::SYNERGEN_ISA
