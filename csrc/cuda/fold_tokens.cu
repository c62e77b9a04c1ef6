// fold_tokens on the GPU: one thread per element of a token vector, one block per stretch of
// tokens. The op reads each table row and writes each output element once, so it is bound by memory
// and nothing is kept on the chip.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/launch.cuh"
#include "kernels.h"

namespace synergen::cuda {
namespace {

__device__ double widen(double x) { return x; }
__device__ float widen(float x) { return x; }
__device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float widen(__half x) { return __half2float(x); }
__device__ void narrow(double x, double& out) { out = x; }
__device__ void narrow(float x, float& out) { out = x; }
__device__ void narrow(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }
__device__ void narrow(float x, __half& out) { out = __float2half_rn(x); }

// Where token (row, col) of the raster lies among the windows: window number, place inside.
struct Slot {
  int64_t window, inside;
};
template <class P>
__device__ Slot slot_of(const P& p, int64_t row, int64_t col) {
  return {row / p.m * (p.w / p.n) + col / p.n, row % p.m * p.n + col % p.n};
}

constexpr int kElements = 64;  // threads along a token vector
constexpr int kTokens = 4;     // tokens of a block at a time
constexpr int64_t kMaxBlocks = 65535;

template <class T>
__global__ void __launch_bounds__(kElements* kTokens) fold_tokens_kernel(FoldTokensParams p) {
  const int64_t raster = p.h * p.w, tokens = p.batch * raster, windows = (p.h / p.m) * (p.w / p.n);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kTokens;
  for (int64_t token = static_cast<int64_t>(blockIdx.x) * kTokens + threadIdx.y; token < tokens;
       token += step) {
    const int64_t image = token / raster, row = token % raster / p.w, col = token % p.w;
    const int64_t id =
        p.ids[image * p.ids_strides[0] + row * p.ids_strides[1] + col * p.ids_strides[2]];
    const bool inside = id >= 0 && id < p.vocab;
    const Slot slot = slot_of(p, row, col);
    const T* from = static_cast<const T*>(p.table) + (inside ? id : 0) * p.table_strides[0];
    const T* pos = static_cast<const T*>(p.pos) + row * p.pos_strides[0] + col * p.pos_strides[1];
    T* y =
        static_cast<T*>(p.y) + ((image * windows + slot.window) * p.m * p.n + slot.inside) * p.dim;
    for (int64_t i = threadIdx.x; i < p.dim; i += kElements) {
      // A kernel cannot refuse an id, so it makes the result of a wrong one plain to see.
      const auto value =
          inside ? widen(from[i * p.table_strides[1]]) + widen(pos[i * p.pos_strides[2]])
                 : widen(pos[i * p.pos_strides[2]]) * __int_as_float(0x7fffffff);
      narrow(value, y[i]);
    }
  }
}

__global__ void __launch_bounds__(256) fold_ids_kernel(FoldIdsParams p) {
  const int64_t raster = p.h * p.w, total = p.batch * raster, windows = (p.h / p.m) * (p.w / p.n);
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; at < total;
       at += step) {
    const int64_t image = at / raster, row = at % raster / p.w, col = at % p.w;
    const Slot slot = slot_of(p, row, col);
    if (p.unfold) {
      p.y[at] =
          p.ids[image * p.strides[0] + slot.window * p.strides[1] + slot.inside * p.strides[2]];
    } else {
      p.y[(image * windows + slot.window) * p.m * p.n + slot.inside] =
          p.ids[image * p.strides[0] + row * p.strides[1] + col * p.strides[2]];
    }
  }
}

int blocks_for(int64_t items, int64_t per_block) {
  const int64_t blocks = ceil_div(items, per_block);
  return static_cast<int>(blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

template <class T>
void launch(const FoldTokensParams& p, cudaStream_t stream) {
  const int blocks = blocks_for(p.batch * p.h * p.w, kTokens);
  fold_tokens_kernel<T><<<blocks, dim3(kElements, kTokens), 0, stream>>>(p);
}

}  // namespace

void fold_tokens(const FoldTokensParams& p, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  switch (p.dtype) {
    case DType::kFloat64:
      launch<double>(p, s);
      break;
    case DType::kFloat32:
      launch<float>(p, s);
      break;
    case DType::kBFloat16:
      launch<__nv_bfloat16>(p, s);
      break;
    default:
      launch<__half>(p, s);
      break;
  }
  check_launch("fold_tokens");
}

void fold_ids(const FoldIdsParams& p, void* stream) {
  fold_ids_kernel<<<blocks_for(p.batch * p.h * p.w, 256), 256, 0,
                    static_cast<cudaStream_t>(stream)>>>(p);
  check_launch("fold_ids");
}

}  // namespace synergen::cuda
