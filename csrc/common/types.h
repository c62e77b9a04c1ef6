// Element types, 16-bit floats as plain storage, and the small pieces that host, CPU and CUDA code
// share.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define SYNERGEN_HD __host__ __device__
#else
#define SYNERGEN_HD
#endif

namespace synergen {

// Kernels take the first six; the others have names so that a refusal can say what came.
enum class DType : int32_t {
  kFloat64,
  kFloat32,
  kBFloat16,
  kFloat16,
  kInt64,
  kBool,
  kInt32,
  kInt16,
  kInt8,
  kUInt8,
  kOther,
};

// Storage only: arithmetic happens in float or double after conversion.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

constexpr int kMaxDims = 8;

SYNERGEN_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The leading dimensions of a strided array, merged where memory allows: row i starts `offset(i)`
// elements into it.
struct Rows {
  int32_t dims = 0;
  int64_t sizes[kMaxDims] = {};
  int64_t strides[kMaxDims] = {};

  SYNERGEN_HD int64_t offset(int64_t row) const {
    int64_t at = 0;
    for (int d = dims - 1; d > 0; --d) {
      at += (row % sizes[d]) * strides[d];
      row /= sizes[d];
    }
    return dims ? at + row * strides[0] : at;
  }
};

}  // namespace synergen
