// What the engine asks of the CPU beside the kernels of the ops: params structs and launchers, for
// each instruction set as in kernels.h of the ops.
#pragma once

#include "engine/matrix.h"

namespace synergen {

// Packs rows of a matrix of float, bfloat16 or float16 (engine/matrix.h). The scale of a group is
// its largest magnitude over 127, or 7, rounded to bfloat16; integers are to the nearest.
struct PackMatrixParams {
  DType dtype;
  const void* from;  // [rows, columns]
  int64_t strides[2];
  engine::Matrix to;  // its sizes; data and scales are written
  void* data;
  bf16* scales;
};

enum class Epilogue : int32_t {
  kStore,  // out = sums
  kAdd,    // out += sums
  kSwiglu  // panels come in pairs, gate and up: out = silu(gate) * up, half as many columns
};

// out[o(r), n] (+)= sum_k x[i(r), k] weight[n, k] + bias[n] for r < rows, with i = x_index and
// o = out_index, or r itself without. Rows of x are floats; beside integer weights each group of
// columns of a row becomes integers of 8 bits and a scale, the largest magnitude over 127.
//
// Sums have one order for every number of rows and of threads: a row's result does not depend on
// what else is computed with it.
struct PackedLinearParams {
  engine::Matrix weight;
  Epilogue epilogue;
  int64_t rows;
  const float* x;  // [.., columns]
  int64_t x_step;
  const int64_t* x_index;
  const float* bias;  // [weight.rows], or null
  float* out;         // [.., weight.rows]; weight.rows / 2 for kSwiglu
  int64_t out_step;
  const int64_t* out_index;
  bool short_x;   // beside bfloat16 weights: x is rounded to bfloat16 too
  void* scratch;  // of the caller's, 64-byte aligned, scratch_bytes() of it
};

// x as it is laid out for the product, at most: 4 bytes a column, and a scale and a start a group.
inline int64_t scratch_bytes(const PackedLinearParams& p) {
  const engine::Matrix& w = p.weight;
  return p.rows * (w.depth() * 4 + w.groups() * 8 + 64) + 256;
}

// Turns the queries of each row by its position, as rope does, and puts its keys, turned, and its
// values into a cache.
struct AppendKeysParams {
  int64_t rows, heads, kv_heads, head_dim;
  float* qkv;  // [rows, (heads + 2 kv_heads) head_dim]; the queries are turned in place
  const float *cosines, *sines;  // [.., head_dim / 2], for each position
  const int64_t* positions;      // [rows]
  const int64_t* sequences;      // [rows]
  float *keys, *values;          // [sequence, position, kv_heads, head_dim]
  int64_t sequence_step;
};

// Attention of rows one after another of one sequence, positions first .. first + rows - 1, each
// over the keys up to its own.
struct PrefillAttentionParams {
  int64_t rows, first, heads, kv_heads, dim;
  float scale;
  const float* q;              // [rows, heads + 2 kv_heads, dim]: what append_keys leaves
  const float *keys, *values;  // [first + rows, kv_heads, dim]
  float* out;                  // [rows, heads, dim]
};

// Reads all bytes once, as fast as it can: what memory allows, for benchmarks.
struct ReadBytesParams {
  const void* data;  // lines of 64 bytes
  int64_t lines;
  uint64_t* sum;  // of all 8-byte words
};

#define SYNERGEN_ENGINE_KERNELS(X)             \
  X(pack_matrix, PackMatrixParams)             \
  X(packed_linear, PackedLinearParams)         \
  X(append_keys, AppendKeysParams)             \
  X(prefill_attention, PrefillAttentionParams) \
  X(read_bytes, ReadBytesParams)

namespace cpu {
#define SYNERGEN_DECLARE(name, Params) void name(const Params& p);
SYNERGEN_ENGINE_KERNELS(SYNERGEN_DECLARE)
namespace baseline {
SYNERGEN_ENGINE_KERNELS(SYNERGEN_DECLARE)
}
namespace avx2 {
SYNERGEN_ENGINE_KERNELS(SYNERGEN_DECLARE)
}
namespace avx512 {
SYNERGEN_ENGINE_KERNELS(SYNERGEN_DECLARE)
}
namespace avx512bf16 {
SYNERGEN_ENGINE_KERNELS(SYNERGEN_DECLARE)
}
#undef SYNERGEN_DECLARE
}  // namespace cpu

}  // namespace synergen
