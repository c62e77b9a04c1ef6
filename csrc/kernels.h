// One params struct per kernel and its launchers: the only prototypes. Strides are in elements, sizes and offsets
// 64-bit. Launchers trust their params: csrc/ops/ has checked them.
//
// To add a kernel: a struct here, a line in SYNERGEN_CPU_KERNELS, csrc/cpu/<op>.cpp with a function of that name.
// With CUDA: a line in SYNERGEN_CUDA_KERNELS and csrc/cuda/<op>.cu too.
#pragma once

#include "common/types.h"

namespace synergen {

// y = x / sqrt(mean(x^2) + eps) * weight over the last dimension.
struct RmsNormParams {
  DType dtype;         // of x and y
  DType weight_dtype;  // as dtype, or float32
  int64_t rows, dim;
  double eps;
  const void* x;  // [rows, dim]
  Rows x_rows;
  int64_t x_stride;  // between elements of a row
  const void* weight;  // [dim]
  int64_t weight_stride;
  void* y;  // [rows, dim], contiguous
};

#define SYNERGEN_CPU_KERNELS(X) X(rms_norm, RmsNormParams)

#define SYNERGEN_CUDA_KERNELS(X)

// cpu::<kernel> picks the instruction set when called; cpu::baseline, cpu::avx2 and cpu::avx512 hold the same sources.
namespace cpu {
#define SYNERGEN_DECLARE(name, Params) void name(const Params& p);
SYNERGEN_CPU_KERNELS(SYNERGEN_DECLARE)
namespace baseline {
SYNERGEN_CPU_KERNELS(SYNERGEN_DECLARE)
}
namespace avx2 {
SYNERGEN_CPU_KERNELS(SYNERGEN_DECLARE)
}
namespace avx512 {
SYNERGEN_CPU_KERNELS(SYNERGEN_DECLARE)
}
#undef SYNERGEN_DECLARE
}  // namespace cpu

// Each checks the launch and throws std::runtime_error with CUDA's own words.
namespace cuda {
#define SYNERGEN_DECLARE(name, Params) void name(const Params& p, void* stream);
SYNERGEN_CUDA_KERNELS(SYNERGEN_DECLARE)
#undef SYNERGEN_DECLARE
}  // namespace cuda

}  // namespace synergen
