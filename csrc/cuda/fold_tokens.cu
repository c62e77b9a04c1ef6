// fold_tokens on the GPU: a block row of threads walks along a token vector, a block takes several
// tokens. Each table row is read and each output element written once, 16 bytes at a time, so the
// op is bound by memory and nothing is kept on the chip.
#include "cuda/access.cuh"
#include "kernels.h"

namespace synergen::cuda {
namespace {

// Where token (row, col) of the raster lies among the windows: window number, place inside.
struct Slot {
  int64_t window, inside;
};
template <class P>
SIMT_FN Slot slot_of(const P& p, int64_t row, int64_t col) {
  return {row / p.m * (p.w / p.n) + col / p.n, row % p.m * p.n + col % p.n};
}

constexpr int kAlong = 64;  // threads along a token vector
constexpr int kTokens = 4;  // tokens of a block at a time
constexpr int kAhead = 4;   // accesses of a thread under way together

template <class T, int N>
__global__ void __launch_bounds__(kAlong* kTokens) fold_tokens_kernel(FoldTokensParams p) {
  const int64_t raster = p.h * p.w, tokens = p.batch * raster, windows = (p.h / p.m) * (p.w / p.n);
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kTokens + threadIdx.y, count = p.dim / N;
  if (token >= tokens) return;
  const int64_t image = token / raster, row = token % raster / p.w, col = token % p.w;
  const int64_t id =
      p.ids[image * p.ids_strides[0] + row * p.ids_strides[1] + col * p.ids_strides[2]];
  const bool inside = id >= 0 && id < p.vocab;
  const Slot slot = slot_of(p, row, col);
  const T* from = static_cast<const T*>(p.table) + (inside ? id : 0) * p.table_strides[0];
  const T* pos = static_cast<const T*>(p.pos) + row * p.pos_strides[0] + col * p.pos_strides[1];
  T* y = static_cast<T*>(p.y) + ((image * windows + slot.window) * p.m * p.n + slot.inside) * p.dim;
  // A kernel cannot refuse an id, so it makes the result of a wrong one plain to see.
  const Acc<T> mark = inside ? Acc<T>(0) : static_cast<Acc<T>>(__uint_as_float(0x7fffffffu));
  for (int64_t begin = threadIdx.x; begin < count; begin += kAhead * kAlong) {
    Pack<T, N> a[kAhead], b[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int64_t i = begin + k * kAlong;
      if (i >= count) continue;
      b[k] = load_pack<N>(pos, i, p.pos_strides[2]);
      a[k] = inside ? load_pack<N>(from, i, p.table_strides[1]) : b[k];
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int64_t i = begin + k * kAlong;
      if (i >= count) continue;
      Pack<T, N> out;
#pragma unroll
      for (int e = 0; e < N; ++e) {
        out.v[e] = simt::narrow<T>(simt::widen(a[k].v[e]) + simt::widen(b[k].v[e]) + mark);
      }
      store_pack(y, i, out);
    }
  }
}

__global__ void __launch_bounds__(256) fold_ids_kernel(FoldIdsParams p) {
  const int64_t raster = p.h * p.w, total = p.batch * raster, windows = (p.h / p.m) * (p.w / p.n);
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= total) return;
  const int64_t image = at / raster, row = at % raster / p.w, col = at % p.w;
  const Slot slot = slot_of(p, row, col);
  if (p.unfold) {
    p.y[at] = p.ids[image * p.strides[0] + slot.window * p.strides[1] + slot.inside * p.strides[2]];
  } else {
    p.y[(image * windows + slot.window) * p.m * p.n + slot.inside] =
        p.ids[image * p.strides[0] + row * p.strides[1] + col * p.strides[2]];
  }
}

template <class T>
void forward(const FoldTokensParams& p, void* stream) {
  constexpr int N = kPack<T>;
  const bool packed = p.dim % N == 0 && packs<T>(p.table, p.table_strides[1], p.table_strides, 1) &&
                      packs<T>(p.pos, p.pos_strides[2], p.pos_strides, 2) &&
                      packs<T>(p.y, 1, nullptr, 0);
  const dim3 blocks = blocks_for("fold_tokens", p.batch * p.h * p.w, kTokens);
  const dim3 threads(kAlong, kTokens);
  if (packed) {
    simt::launch("fold_tokens", fold_tokens_kernel<T, N>, blocks, threads, 0, stream, p);
  } else {
    simt::launch("fold_tokens", fold_tokens_kernel<T, 1>, blocks, threads, 0, stream, p);
  }
}

}  // namespace

void fold_tokens(const FoldTokensParams& p, void* stream) {
  dispatch_float(p.dtype, [&](auto tag) { forward<typename decltype(tag)::type>(p, stream); });
}

void fold_ids(const FoldIdsParams& p, void* stream) {
  simt::launch("fold_ids", fold_ids_kernel, blocks_for("fold_ids", p.batch * p.h * p.w, 256),
               dim3(256), 0, stream, p);
}

}  // namespace synergen::cuda
