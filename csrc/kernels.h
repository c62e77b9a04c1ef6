// One params struct per kernel and its launchers: the only prototypes. Strides are in elements,
// sizes and offsets 64-bit. Launchers trust their params: csrc/ops/ has checked them.
//
// To add a kernel: a struct here, a line in SYNERGEN_KERNELS, csrc/cpu/<op>.cpp and
// csrc/cuda/<op>.cu with a function of that name each; and a line in SYNERGEN_CUDA_SCRATCH if the
// second wants memory.
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
  int64_t x_stride;    // between elements of a row
  const void* weight;  // [dim]
  int64_t weight_stride;
  void* y;  // [rows, dim], contiguous
};

struct RmsNormBackwardParams : RmsNormParams {
  const void* dy;  // [rows, dim], dtype of x
  Rows dy_rows;
  int64_t dy_stride;
  void* dx;       // [rows, dim], contiguous
  void* dweight;  // [dim], contiguous, weight_dtype
  void* scratch;  // CUDA only: scratch_bytes() of it, 256-byte aligned
};

// sum = x + residual, rounded to dtype; y = rms_norm(sum).
struct AddRmsNormParams : RmsNormParams {
  const void* residual;  // [rows, dim], dtype of x
  Rows residual_rows;
  int64_t residual_stride;
  void* sum;  // [rows, dim], contiguous
};

// x is the sum; dx is the gradient of x and of residual alike.
struct AddRmsNormBackwardParams : RmsNormBackwardParams {
  const void* dsum;  // [rows, dim], dtype of x
  Rows dsum_rows;
  int64_t dsum_stride;
};

// Rotates the halves of each head by position * theta^(-2 i / dim), i < dim / 2: element i goes
// with i + dim / 2.
struct RopeParams {
  DType dtype;
  int64_t tokens, dim;
  double theta;
  bool inverse;              // rotate back: the transpose, which is also the gradient
  const int64_t* positions;  // [tokens]
  Rows position_rows;
  struct Part {
    int64_t heads;
    const void* x;  // [tokens, heads, dim]
    Rows rows;
    int64_t head_stride, stride;
    void* y;   // [tokens, heads, dim], contiguous
  } parts[2];  // queries, keys
};

// y[b, i, (r * n + c) * d + e] = table[ids[b, row, col], e] + pos[row, col, e] with row = i / (w /
// n) * m + r and col = i % (w / n) * n + c: windows in raster order, row-major inside.
struct FoldTokensParams {
  DType dtype;
  int64_t batch, h, w, m, n, dim, vocab;
  const int64_t* ids;  // [batch, h, w]
  int64_t ids_strides[3];
  const void* table;  // [vocab, dim]
  int64_t table_strides[2];
  const void* pos;  // [h, w, dim]
  int64_t pos_strides[3];
  void* y;  // [batch, (h / m) * (w / n), m * n * dim], contiguous
};

struct FoldTokensBackwardParams : FoldTokensParams {
  const void* dy;  // [batch, (h / m) * (w / n), m * n * dim]
  int64_t dy_strides[3];
  void* dtable;   // [vocab, dim], contiguous
  void* dpos;     // [h, w, dim], contiguous
  void* scratch;  // CUDA only: scratch_bytes() of it, 256-byte aligned
};

// The same re-ordering for the ids alone, between the raster [batch, h, w] and windows [batch,
// windows, m * n].
struct FoldIdsParams {
  int64_t batch, h, w, m, n;
  const int64_t* ids;
  int64_t strides[3];
  int64_t* y;   // contiguous
  bool unfold;  // windows to raster
};

// y_t = sum_j weight_tj * down[e] (silu(gate[e] x_t) * (up[e] x_t)), e = index_tj. Indices >=
// experts add nothing.
// Pairs (token, j), numbered token * top_k + j, sorted by expert, those of one expert in the order
// they come: row r of expert e, offsets[e] <= r < offsets[e + 1], is the pair order[r]. Pairs
// without an expert are left out; order is -1 after the last row.
struct RouteTokensParams {
  int64_t tokens, top_k, experts;
  const int64_t* index;  // [tokens, top_k]; no expert has one outside [0, experts)
  int64_t index_strides[2];
  int32_t* order;    // [tokens * top_k]
  int32_t* offsets;  // [experts + 1]
  void* scratch;     // CUDA only: scratch_bytes() of it, 256-byte aligned
};

struct ExpertFfnParams {
  DType dtype;         // of x, y, gate_pre and up_pre
  DType expert_dtype;  // of gate, up and down: as dtype, or float32
  DType weight_dtype;  // of weight: as dtype, or float32
  int64_t tokens, top_k, dim, hidden, experts;
  const void* x;  // [tokens, dim]
  int64_t x_strides[2];
  const void *gate, *up, *down;  // [experts, hidden, dim] twice, [experts, dim, hidden]
  int64_t gate_strides[3], up_strides[3], down_strides[3];
  const int64_t* index;  // [tokens, top_k]; negative ones, on CUDA alone, make NaN
  int64_t index_strides[2];
  const void* weight;  // [tokens, top_k], or null: all ones
  int64_t weight_strides[2];
  const int32_t *routed_order,
      *routed_offsets;  // order and offsets of route_tokens, or null. Used
                        // on CUDA; the CPU sorts in less than it could save
  void* y;              // [tokens, dim], contiguous, or null: only gate_pre and up_pre are wanted
  void *gate_pre,
      *up_pre;    // gate[e] x_t and up[e] x_t, [tokens * top_k, hidden], contiguous; or null
  void* scratch;  // CUDA only: scratch_bytes() of it, 256-byte aligned
};

// expert_ffn with weights of 8 or 4 bits: value times the scale of its group.
struct ExpertFfnQuantizedParams : ExpertFfnParams {
  // expert_dtype is int8, or uint8 where a byte holds two weights: then the last sizes of gate, up
  // and down are half, and every 8 columns lie in 4 bytes as in cuda/stream.cuh.
  int64_t gate_group, down_group;                  // columns of dim, of hidden that share a scale
  const void *gate_scale, *up_scale, *down_scale;  // [experts, hidden, dim / gate_group] twice,
                                                   // [experts, dim, hidden / down_group], of dtype
  int64_t gate_scale_strides[3], up_scale_strides[3], down_scale_strides[3];
};

// The gradients of expert_ffn, each contiguous and shaped like what it belongs to, or null where
// not wanted. y is not used; gate_pre and up_pre are read, or computed again where null.
struct ExpertFfnBackwardParams : ExpertFfnParams {
  const void* dy;  // [tokens, dim], dtype of x
  int64_t dy_strides[2];
  void *dx, *dgate, *dup, *ddown, *dweight;
};

// loss_i = log(sum_v exp(x_i . w_v)) - x_i . w_t with t = targets_i; 0 where t is ignore_index.
struct LinearCrossEntropyParams {
  DType dtype;         // of x
  DType weight_dtype;  // as dtype, or float32
  int64_t rows, dim, vocab;
  int64_t ignore_index;
  const void* x;  // [rows, dim]
  int64_t x_strides[2];
  const void* weight;  // [vocab, dim]
  int64_t weight_strides[2];
  const int64_t* targets;  // [rows]; on the CPU in [0, vocab) or ignore_index
  int64_t target_stride;
  void* loss;     // [rows], contiguous: float, or double where x is
  double* lse;    // [rows], contiguous: the logarithm. In float its rounding, of numbers like 10,
                  // would show in every gradient of its row
  void* scratch;  // CUDA only: scratch_bytes() of it, 256-byte aligned
};

// The gradients, contiguous, shaped and typed like what they belong to, or null where not wanted.
// lse is read, loss not used.
struct LinearCrossEntropyBackwardParams : LinearCrossEntropyParams {
  const void* dloss;  // [rows], the dtype of loss
  int64_t dloss_stride;
  void *dx, *dweight;
};

// One argument a row, or one for all rows (stride 0), or none: the default.
template <class T>
struct PerRow {
  const T* data = nullptr;
  int64_t stride = 0;
  SYNERGEN_HD T at(int64_t row, T otherwise) const { return data ? data[row * stride] : otherwise; }
};

// out[b, h] = sum_j w_j v[b, j, h / group] with w = softmax(scale * q[b, h] . k[b, j, h / group])
// over the keys starts[b] <= j < lengths[b], group = heads / kv_heads; 0 where there are none.
struct DecodeAttentionParams {
  DType dtype;  // of q, k, v and out
  int64_t batch, heads, kv_heads, keys, dim;
  double scale;
  const void* q;  // [batch, heads, dim]
  int64_t q_strides[3];
  const void *k, *v;  // [batch, keys, kv_heads, dim] twice
  int64_t k_strides[4], v_strides[4];
  PerRow<int64_t> lengths, starts;  // values outside [0, keys] mean the nearest inside
  void* out;                        // [batch, heads, dim], contiguous
  void* scratch;                    // CUDA only: scratch_bytes() of it, 256-byte aligned
};

// ids[r] ~ softmax(l / temperature) over the top_k and top_p survivors, l = u + guidance * (c - u).
struct SampleTokensParams {
  DType dtype;  // of logits and uncond
  int64_t rows, vocab;
  const void* logits;  // [rows, vocab]
  int64_t logits_strides[2];
  const void* uncond;  // [rows, vocab], or null
  int64_t uncond_strides[2];
  PerRow<int64_t> seed, position, top_k;        // top_k 0: off
  PerRow<double> guidance, temperature, top_p;  // temperature 0: argmax
  int64_t* ids;                                 // [rows]
  bool* valid;    // [rows]; false where the logits hold NaN, +infinity, or nothing finite
  void* scratch;  // CUDA only: scratch_bytes() of it, 256-byte aligned
};

// The matrices of one layer of the unfolding head, [out, in], and what goes with them; contiguous.
struct UnfoldHeadLayer {
  const void *attention_norm, *q, *k, *v, *o;  // [dim], [heads * head_dim, dim], [kv_heads *
                                               // head_dim, dim] twice, [dim, heads * head_dim]
  const void *ffn_norm, *gate, *up, *down;     // [dim], [hidden, dim] twice, [dim, hidden]
  const void *q_bias, *k_bias, *v_bias;  // as many as q, k and v have rows; or null, all three
};

// All `window` ids of a patch, one after another, for each picture: the head's sequence is the
// backbone's state, then the embeddings of the ids drawn so far. Rows are the pictures, or, with
// guidance, the pictures and after them the same pictures without their prompts: two rows to a
// picture, which share its ids.
struct UnfoldHeadParams {
  DType dtype;  // of everything that is not an integer or a number for each picture
  int64_t rows, pictures, dim, layers, heads, kv_heads, head_dim, hidden, window, vocab;
  double eps, theta;
  bool persistent;     // CUDA only: one launch for all ids, instead of several for each
  const void* states;  // [rows, dim]
  int64_t states_strides[2];
  const void *tokens, *positions;         // [vocab, dim], [window, dim], contiguous
  const UnfoldHeadLayer* layer;           // [layers], in the host's memory
  const void *norm, *classifier;          // [dim], [vocab, dim], contiguous
  PerRow<int64_t> seed, position, top_k;  // position: the first of `window` draws
  PerRow<double> guidance, temperature, top_p;
  int64_t* ids;   // [pictures, window], contiguous
  bool* valid;    // [pictures]; false where the logits of any id gave nothing to choose from
  void* scratch;  // CUDA only: scratch_bytes() of it, 256-byte aligned
};

#define SYNERGEN_KERNELS(X)                                          \
  X(rms_norm, RmsNormParams)                                         \
  X(rms_norm_backward, RmsNormBackwardParams)                        \
  X(rope, RopeParams)                                                \
  X(fold_tokens, FoldTokensParams)                                   \
  X(fold_tokens_backward, FoldTokensBackwardParams)                  \
  X(fold_ids, FoldIdsParams)                                         \
  X(route_tokens, RouteTokensParams)                                 \
  X(expert_ffn, ExpertFfnParams)                                     \
  X(expert_ffn_backward, ExpertFfnBackwardParams)                    \
  X(expert_ffn_quantized, ExpertFfnQuantizedParams)                  \
  X(sample_tokens, SampleTokensParams)                               \
  X(add_rms_norm, AddRmsNormParams)                                  \
  X(add_rms_norm_backward, AddRmsNormBackwardParams)                 \
  X(decode_attention, DecodeAttentionParams)                         \
  X(linear_cross_entropy, LinearCrossEntropyParams)                  \
  X(linear_cross_entropy_backward, LinearCrossEntropyBackwardParams) \
  X(unfold_head, UnfoldHeadParams)

// CPU kernels that multiply bfloat16 where the CPU has an instruction for it.
#define SYNERGEN_BF16_KERNELS(X) \
  X(expert_ffn, ExpertFfnParams) \
  X(expert_ffn_backward, ExpertFfnBackwardParams)

// CUDA kernels that want device memory for themselves while they run, in params.scratch.
#define SYNERGEN_CUDA_SCRATCH(X)                                     \
  X(rms_norm_backward, RmsNormBackwardParams)                        \
  X(fold_tokens_backward, FoldTokensBackwardParams)                  \
  X(route_tokens, RouteTokensParams)                                 \
  X(expert_ffn, ExpertFfnParams)                                     \
  X(expert_ffn_backward, ExpertFfnBackwardParams)                    \
  X(expert_ffn_quantized, ExpertFfnQuantizedParams)                  \
  X(sample_tokens, SampleTokensParams)                               \
  X(add_rms_norm_backward, AddRmsNormBackwardParams)                 \
  X(decode_attention, DecodeAttentionParams)                         \
  X(linear_cross_entropy, LinearCrossEntropyParams)                  \
  X(linear_cross_entropy_backward, LinearCrossEntropyBackwardParams) \
  X(unfold_head, UnfoldHeadParams)

// cpu::<kernel> picks the instruction set when called; cpu::baseline, cpu::avx2, cpu::avx512 and
// cpu::avx512bf16 hold the same sources, the last only those that gain from it.
namespace cpu {
#define SYNERGEN_DECLARE(name, Params) void name(const Params& p);
SYNERGEN_KERNELS(SYNERGEN_DECLARE)
namespace baseline {
SYNERGEN_KERNELS(SYNERGEN_DECLARE)
}
namespace avx2 {
SYNERGEN_KERNELS(SYNERGEN_DECLARE)
}
namespace avx512 {
SYNERGEN_KERNELS(SYNERGEN_DECLARE)
}
namespace avx512bf16 {
using namespace avx512;
SYNERGEN_BF16_KERNELS(SYNERGEN_DECLARE)
}  // namespace avx512bf16
#undef SYNERGEN_DECLARE
}  // namespace cpu

// Each checks the launch and throws std::runtime_error with CUDA's own words, or
// std::invalid_argument for sizes that no launch can have.
namespace cuda {
#define SYNERGEN_DECLARE(name, Params) void name(const Params& p, void* stream);
SYNERGEN_KERNELS(SYNERGEN_DECLARE)
#undef SYNERGEN_DECLARE
#define SYNERGEN_DECLARE(name, Params) int64_t scratch_bytes(const Params& p);
SYNERGEN_CUDA_SCRATCH(SYNERGEN_DECLARE)
#undef SYNERGEN_DECLARE
}  // namespace cuda

}  // namespace synergen
