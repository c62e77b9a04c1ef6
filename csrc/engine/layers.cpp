// One pass of rows through the layers of the backbone or of the head.
#include <algorithm>
#include <cmath>

#include "engine/session.h"
#include "kernels.h"

namespace synergen::engine {

void Session::linear(const Matrix& weight, const float* bias, int64_t rows, const float* x,
                     int64_t x_step, float* out, int64_t out_step, Epilogue epilogue,
                     const int64_t* x_index, const int64_t* out_index) {
  if (rows == 0) return;
  PackedLinearParams p{weight, epilogue, rows,     x,         x_step,   x_index,
                       bias,   out,      out_step, out_index, short_x_, nullptr};
  p.scratch = laid_out_.fit(scratch_bytes(p));
  cpu::packed_linear(p);
}

void Session::normalise(const float* x, const float* weight, int64_t rows, float* out) const {
  RmsNormParams p{};
  p.dtype = p.weight_dtype = DType::kFloat32;
  p.rows = rows;
  p.dim = s_.dim;
  p.eps = s_.eps;
  p.x = x;
  p.x_rows.dims = 1;
  p.x_rows.sizes[0] = rows;
  p.x_rows.strides[0] = s_.dim;
  p.x_stride = p.weight_stride = 1;
  p.weight = weight;
  p.y = out;
  cpu::rms_norm(p);
}

// mixed_ = attention of qkv_'s queries over the cache, each row up to its own position. Rows of
// sequences one after another lie a sequence apart: one call.
void Session::attend(Cache& cache, int64_t layer, const Place& place) {
  const int64_t rows = place.rows(), qkv = s_.queries() + 2 * s_.keys();
  lengths_.resize(static_cast<size_t>(rows));
  for (int64_t r = 0; r < rows; ++r) lengths_[r] = place.positions[r] + 1;
  for (int64_t begin = 0; begin < rows;) {
    const int64_t first = place.sequences[begin];
    int64_t end = begin + 1;
    while (end < rows && place.sequences[end] == first + end - begin) ++end;
    DecodeAttentionParams p{};
    p.dtype = DType::kFloat32;
    p.batch = end - begin;
    p.heads = s_.heads;
    p.kv_heads = s_.kv_heads;
    p.keys = cache.capacity;
    p.dim = s_.head_dim;
    p.scale = 1 / std::sqrt(static_cast<double>(s_.head_dim));
    p.q = qkv_.data() + begin * qkv;
    p.q_strides[0] = qkv;
    p.q_strides[1] = s_.head_dim;
    p.q_strides[2] = 1;
    p.k = cache.keys(layer) + first * cache.sequence_step;
    p.v = cache.values(layer) + first * cache.sequence_step;
    const int64_t strides[4] = {cache.sequence_step, s_.keys(), s_.head_dim, 1};
    std::copy_n(strides, 4, p.k_strides);
    std::copy_n(strides, 4, p.v_strides);
    p.lengths = {lengths_.data() + begin, 1};
    p.out = mixed_.data() + begin * s_.queries();
    cpu::decode_attention(p);
    begin = end;
  }
}

// The same for rows that lie together by sequence, positions rising by one.
void Session::attend_prompt(Cache& cache, int64_t layer, const Place& place) {
  const int64_t rows = place.rows(), qkv = s_.queries() + 2 * s_.keys();
  for (int64_t begin = 0; begin < rows;) {
    const int64_t sequence = place.sequences[begin];
    int64_t end = begin + 1;
    while (end < rows && place.sequences[end] == sequence) ++end;
    const float scale = 1 / std::sqrt(static_cast<float>(s_.head_dim));
    cpu::prefill_attention({end - begin, place.positions[begin], s_.heads, s_.kv_heads, s_.head_dim,
                            scale, qkv_.data() + begin * qkv,
                            cache.keys(layer) + sequence * cache.sequence_step,
                            cache.values(layer) + sequence * cache.sequence_step,
                            mixed_.data() + begin * s_.queries()});
    begin = end;
  }
}

// x += ffn(normed_) of one expert, for the rows that take it, or for all.
void Session::ffn(const Layer& layer, int expert, const std::vector<int64_t>* rows, int64_t count,
                  float* x) {
  const int64_t hidden = s_.padded_hidden();
  const int64_t* index = rows ? rows->data() : nullptr;
  linear(layer.gate_up[expert], nullptr, count, normed_.data(), s_.dim, hidden_.data(), hidden,
         Epilogue::kSwiglu, index);
  linear(layer.down[expert], nullptr, count, hidden_.data(), hidden, x, s_.dim, Epilogue::kAdd,
         nullptr, index);
}

// x [rows, dim] through all layers of the backbone or of the head, without the last norm.
void Session::layers(const Stack& stack, Cache& cache, const Place& place, float* x) {
  const bool backbone = &stack == &w_.backbone;
  const int64_t rows = place.rows(), qkv = s_.queries() + 2 * s_.keys();
  for (size_t l = 0; l < stack.layers.size(); ++l) {
    const Layer& layer = stack.layers[l];
    normalise(x, layer.attention_norm, rows, normed_.data());
    linear(layer.qkv, layer.qkv_bias, rows, normed_.data(), s_.dim, qkv_.data(), qkv);
    cpu::append_keys({rows, s_.heads, s_.kv_heads, s_.head_dim, qkv_.data(),
                      (backbone ? cosines_ : head_cosines_).data(),
                      (backbone ? sines_ : head_sines_).data(), place.positions.data(),
                      place.sequences.data(), cache.keys(static_cast<int64_t>(l)),
                      cache.values(static_cast<int64_t>(l)), cache.sequence_step});
    if (place.prompt) {
      attend_prompt(cache, static_cast<int64_t>(l), place);
    } else {
      attend(cache, static_cast<int64_t>(l), place);
    }
    linear(layer.out, nullptr, rows, mixed_.data(), s_.queries(), x, s_.dim, Epilogue::kAdd);
    normalise(x, layer.ffn_norm, rows, normed_.data());
    if (!backbone) {
      ffn(layer, 0, nullptr, rows, x);
    } else {  // FFN-MMoE, section 3.2
      ffn(layer, 0, &place.of_text, static_cast<int64_t>(place.of_text.size()), x);
      ffn(layer, 1, &place.of_image, static_cast<int64_t>(place.of_image.size()), x);
    }
  }
}

}  // namespace synergen::engine
