// rms_norm and add_rms_norm on the GPU: a block takes a row, reads it once and keeps it in
// registers between the sum and the scaling. Bound by memory: 2 reads or writes of a row forward, 3
// backward; with a residual 4 and 4, where an addition before and after would read and write 5
// and 6.
#include "cuda/access.cuh"
#include "kernels.h"

namespace synergen::cuda {
namespace {

// Accesses that a thread makes at once and holds in registers; what lies beyond (rows longer than 4
// x 512 accesses, 32 KiB) is read a second time, from the cache. In float64 that is all of it: its
// reciprocal root is a call, and ptxas spills what is held around a call.
constexpr int kEach = 4;
template <class T>
constexpr int kHeld = sizeof(T) == 8 ? 0 : kEach;

// The row to be normalised: pack i the first time, and again.
template <class T, int N>
class Input {
 public:
  SIMT_FN Input(const RmsNormParams& p, int64_t row)
      : x_(static_cast<const T*>(p.x) + p.x_rows.offset(row)), stride_(p.x_stride) {}
  SIMT_FN Pack<T, N> read(int64_t i) const { return load_pack<N>(x_, i, stride_); }
  SIMT_FN Pack<T, N> again(int64_t i) const { return read(i); }

 private:
  const T* x_;
  int64_t stride_;
};

// The same where it is a sum: rounded and written when it is first read.
template <class T, int N>
class SumInput {
 public:
  SIMT_FN SumInput(const AddRmsNormParams& p, int64_t row)
      : x_(p, row),
        residual_(static_cast<const T*>(p.residual) + p.residual_rows.offset(row)),
        stride_(p.residual_stride),
        sum_(static_cast<T*>(p.sum) + row * p.dim) {}
  SIMT_FN Pack<T, N> read(int64_t i) const {
    Pack<T, N> x = x_.read(i);
    const Pack<T, N> residual = load_pack<N>(residual_, i, stride_);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      x.v[e] = simt::narrow<T>(simt::widen(x.v[e]) + simt::widen(residual.v[e]));
    }
    store_pack(sum_, i, x);
    return x;
  }
  SIMT_FN Pack<T, N> again(int64_t i) const { return load_pack<N>(sum_, i, 1); }

 private:
  Input<T, N> x_;
  const T* residual_;
  int64_t stride_;
  T* sum_;
};

// Launch bounds name one block a multiprocessor at least: without it ptxas spills a few registers
// to fit one block more.
template <class P>
constexpr bool kSum =
    std::is_base_of_v<AddRmsNormParams, P> || std::is_base_of_v<AddRmsNormBackwardParams, P>;

template <class P, class T, class W, int N>
__global__ void __launch_bounds__(512, 1) rms_norm_kernel(P p) {
  using A = Acc<T>;
  SIMT_SHARED(A, partial, [32]);
  const int64_t count = p.dim / N, beyond = static_cast<int64_t>(kHeld<T>) * blockDim.x;
  const W* weight = static_cast<const W*>(p.weight);
  const int64_t row = blockIdx.x;
  const std::conditional_t<kSum<P>, SumInput<T, N>, Input<T, N>> input(p, row);
  T* y = static_cast<T*>(p.y) + row * p.dim;
  const A share = A(1) / static_cast<A>(p.dim);
  Pack<T, N> held[kEach];
  A sum = 0;
  const auto add = [&](const Pack<T, N>& pack) {
#pragma unroll
    for (int e = 0; e < N; ++e) sum += simt::widen(pack.v[e]) * simt::widen(pack.v[e]);
  };
#pragma unroll
  for (int k = 0; k < kHeld<T>; ++k) {
    const int64_t i = threadIdx.x + static_cast<int64_t>(k) * blockDim.x;
    if (i < count) add(held[k] = input.read(i));
  }
  for (int64_t i = threadIdx.x + beyond; i < count; i += blockDim.x) {
    add(input.read(i));
  }
  const A mean = block_sum(sum, partial) * share;
  const A scale = simt::reciprocal_sqrt(mean + static_cast<A>(p.eps));
  const auto write = [&](int64_t i, const Pack<T, N>& pack) {
    const Pack<W, N> w = load_pack<N>(weight, i, p.weight_stride);
    Pack<T, N> out;
#pragma unroll
    for (int e = 0; e < N; ++e) {
      out.v[e] = simt::narrow<T>(simt::widen(pack.v[e]) * scale * simt::widen(w.v[e]));
    }
    store_pack(y, i, out);
  };
#pragma unroll
  for (int k = 0; k < kHeld<T>; ++k) {
    const int64_t i = threadIdx.x + static_cast<int64_t>(k) * blockDim.x;
    if (i < count) write(i, held[k]);
  }
  for (int64_t i = threadIdx.x + beyond; i < count; i += blockDim.x) {
    write(i, input.again(i));
  }
}

// With r = 1 / sqrt(mean(x^2) + eps): dx = r (dy weight - r^2 x mean(dy weight x)), and the terms
// of dweight = sum over rows of dy x r; where x was a sum, its own gradient comes on top of dx. A
// block takes a run of rows and keeps its part of dweight in registers, beyond them in its row of
// scratch, [pieces, dim].
template <class P, class T, class W, int N>
__global__ void __launch_bounds__(512, 1) rms_norm_backward_kernel(P p) {
  using A = Acc<T>;
  SIMT_SHARED(A, partial, [32]);
  const int64_t count = p.dim / N, beyond = static_cast<int64_t>(kHeld<T>) * blockDim.x;
  const A share = A(1) / static_cast<A>(p.dim);
  const W* weight = static_cast<const W*>(p.weight);
  A* total = static_cast<A*>(p.scratch) + blockIdx.x * p.dim;
  A column[kEach][N] = {};
  for (int64_t i = threadIdx.x + beyond; i < count; i += blockDim.x) {
    for (int e = 0; e < N; ++e) total[i * N + e] = 0;
  }
  const int64_t last = p.rows * (blockIdx.x + int64_t{1}) / gridDim.x;
  for (int64_t row = p.rows * blockIdx.x / gridDim.x; row < last; ++row) {
    const T* x = static_cast<const T*>(p.x) + p.x_rows.offset(row);
    const T* dy = static_cast<const T*>(p.dy) + p.dy_rows.offset(row);
    T* dx = static_cast<T*>(p.dx) + row * p.dim;
    const T* dsum = nullptr;
    if constexpr (kSum<P>) dsum = static_cast<const T*>(p.dsum) + p.dsum_rows.offset(row);
    Pack<T, N> held_x[kEach], held_dy[kEach];
    A square = 0, product = 0;
    const auto add = [&](int64_t i, const Pack<T, N>& a, const Pack<T, N>& b) {
      const Pack<W, N> w = load_pack<N>(weight, i, p.weight_stride);
#pragma unroll
      for (int e = 0; e < N; ++e) {
        const A value = simt::widen(a.v[e]);
        square += value * value;
        product += simt::widen(b.v[e]) * simt::widen(w.v[e]) * value;
      }
    };
#pragma unroll
    for (int k = 0; k < kHeld<T>; ++k) {
      const int64_t i = threadIdx.x + static_cast<int64_t>(k) * blockDim.x;
      if (i >= count) continue;
      held_x[k] = load_pack<N>(x, i, p.x_stride);
      held_dy[k] = load_pack<N>(dy, i, p.dy_stride);
      add(i, held_x[k], held_dy[k]);
    }
    for (int64_t i = threadIdx.x + beyond; i < count; i += blockDim.x) {
      add(i, load_pack<N>(x, i, p.x_stride), load_pack<N>(dy, i, p.dy_stride));
    }
    const A mean = block_sum(square, partial) * share;
    const A r = simt::reciprocal_sqrt(mean + static_cast<A>(p.eps));
    const A slope = block_sum(product, partial) * share * r * r;
    const auto write = [&](int64_t i, const Pack<T, N>& a, const Pack<T, N>& b, A* sums) {
      const Pack<W, N> w = load_pack<N>(weight, i, p.weight_stride);
      Pack<T, N> own, out;  // own is read here: held with the others it would not fit 128 registers
      if constexpr (kSum<P>) own = load_pack<N>(dsum, i, p.dsum_stride);
#pragma unroll
      for (int e = 0; e < N; ++e) {
        const A value = simt::widen(a.v[e]), d = simt::widen(b.v[e]);
        sums[e] += d * value * r;
        A result = (d * simt::widen(w.v[e]) - value * slope) * r;
        if constexpr (kSum<P>) result += simt::widen(own.v[e]);
        out.v[e] = simt::narrow<T>(result);
      }
      store_pack(dx, i, out);
    };
#pragma unroll
    for (int k = 0; k < kHeld<T>; ++k) {
      const int64_t i = threadIdx.x + static_cast<int64_t>(k) * blockDim.x;
      if (i < count) write(i, held_x[k], held_dy[k], column[k]);
    }
    for (int64_t i = threadIdx.x + beyond; i < count; i += blockDim.x) {
      write(i, load_pack<N>(x, i, p.x_stride), load_pack<N>(dy, i, p.dy_stride), total + i * N);
    }
  }
#pragma unroll
  for (int k = 0; k < kHeld<T>; ++k) {
    const int64_t i = threadIdx.x + static_cast<int64_t>(k) * blockDim.x;
    if (i >= count) continue;
    for (int e = 0; e < N; ++e) total[i * N + e] = column[k][e];
  }
}

// dweight = the blocks' parts, added in order: the same bits on every GPU.
struct WeightSum {
  int64_t pieces, dim;
  const void* partial;  // [pieces, dim]
  void* dweight;        // [dim]
};
template <class A, class W>
__global__ void __launch_bounds__(256) rms_norm_weight_kernel(WeightSum p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= p.dim) return;
  const A* partial = static_cast<const A*>(p.partial);
  A sum = 0;
  for (int64_t piece = 0; piece < p.pieces; ++piece) sum += partial[piece * p.dim + i];
  static_cast<W*>(p.dweight)[i] = simt::narrow<W>(sum);
}

template <class T>
bool residual_packs(const RmsNormParams&) {
  return true;
}
template <class T>
bool residual_packs(const AddRmsNormParams& p) {
  return packs<T>(p.residual, p.residual_stride, p.residual_rows) && packs<T>(p.sum, 1, nullptr, 0);
}
template <class T>
bool residual_packs(const AddRmsNormBackwardParams& p) {
  return packs<T>(p.dsum, p.dsum_stride, p.dsum_rows);
}

template <class T, class W, class P>
void forward(const P& p, void* stream) {
  constexpr int N = kPack<T>;
  const char* op = kSum<P> ? "add_rms_norm" : "rms_norm";
  const bool packed =
      p.dim % N == 0 && residual_packs<T>(p) && packs<T>(p.x, p.x_stride, p.x_rows) &&
      packs<W>(p.weight, p.weight_stride, nullptr, 0) && packs<T>(p.y, 1, nullptr, 0);
  const dim3 blocks = blocks_for(op, p.rows, 1);
  if (packed) {
    simt::launch(op, rms_norm_kernel<P, T, W, N>, blocks, dim3(threads_for(p.dim / N, kEach, 512)),
                 0, stream, p);
  } else {
    simt::launch(op, rms_norm_kernel<P, T, W, 1>, blocks, dim3(threads_for(p.dim, kEach, 512)), 0,
                 stream, p);
  }
}

// Blocks of the backward pass, each with a part of dweight: enough for 4 on each of 128
// multiprocessors; their float32 parts are a twelfth of what 8,192 rows in bfloat16 read and write.
int64_t pieces_of(const RmsNormBackwardParams& p) { return p.rows < 512 ? p.rows : 512; }

template <class T, class W, class P>
void backward(const P& p, void* stream) {
  constexpr int N = kPack<T>;
  const bool packed =
      p.dim % N == 0 && residual_packs<T>(p) && packs<T>(p.x, p.x_stride, p.x_rows) &&
      packs<T>(p.dy, p.dy_stride, p.dy_rows) && packs<W>(p.weight, p.weight_stride, nullptr, 0) &&
      packs<T>(p.dx, 1, nullptr, 0);
  const char* op = kSum<P> ? "add_rms_norm_backward" : "rms_norm_backward";
  const int64_t pieces = pieces_of(p);
  if (pieces > 0) {
    const dim3 blocks(static_cast<unsigned>(pieces));
    if (packed) {
      simt::launch(op, rms_norm_backward_kernel<P, T, W, N>, blocks,
                   dim3(threads_for(p.dim / N, 1, 512)), 0, stream, p);
    } else {
      simt::launch(op, rms_norm_backward_kernel<P, T, W, 1>, blocks,
                   dim3(threads_for(p.dim, 1, 512)), 0, stream, p);
    }
  }
  simt::launch(op, rms_norm_weight_kernel<Acc<T>, W>, blocks_for(op, p.dim, 256), dim3(256), 0,
               stream, WeightSum{pieces, p.dim, p.scratch, p.dweight});
}

// f(Type<T>, Type<W>): the weight has the dtype of x, or float32.
template <class F>
void dispatch(const RmsNormParams& p, F&& f) {
  dispatch_float(p.dtype, [&](auto tag) {
    if (p.weight_dtype == p.dtype) {
      f(tag, tag);
    } else {
      f(tag, Type<float>{});
    }
  });
}

}  // namespace

void rms_norm(const RmsNormParams& p, void* stream) {
  dispatch(p, [&](auto x, auto weight) {
    forward<typename decltype(x)::type, typename decltype(weight)::type>(p, stream);
  });
}

int64_t scratch_bytes(const RmsNormBackwardParams& p) {
  return pieces_of(p) * p.dim * (p.dtype == DType::kFloat64 ? 8 : 4);
}

void rms_norm_backward(const RmsNormBackwardParams& p, void* stream) {
  dispatch(p, [&](auto x, auto weight) {
    backward<typename decltype(x)::type, typename decltype(weight)::type>(p, stream);
  });
}

void add_rms_norm(const AddRmsNormParams& p, void* stream) {
  dispatch(p, [&](auto x, auto weight) {
    forward<typename decltype(x)::type, typename decltype(weight)::type>(p, stream);
  });
}

int64_t scratch_bytes(const AddRmsNormBackwardParams& p) {
  return scratch_bytes(static_cast<const RmsNormBackwardParams&>(p));
}

void add_rms_norm_backward(const AddRmsNormBackwardParams& p, void* stream) {
  dispatch(p, [&](auto x, auto weight) {
    backward<typename decltype(x)::type, typename decltype(weight)::type>(p, stream);
  });
}

}  // namespace synergen::cuda
