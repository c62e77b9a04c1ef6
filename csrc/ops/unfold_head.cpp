#include <algorithm>

#include "ops/ops.h"
#include "ops/sampling.h"

namespace synergen {
namespace {

constexpr const char* kOp = "unfold_head";

// A weight of this shape, of the dtype of states, in rows without gaps: kernels stream it.
const void* weight(const std::string& name, const Tensor& t, const char* form, const Sizes& wanted,
                   const Tensor& states, const Call& call) {
  check_shape(kOp, name.c_str(), t, form, wanted);
  check_same_dtype(kOp, name.c_str(), t, "states", states);
  check_same_device(kOp, name.c_str(), t, call);
  int64_t step = 1;
  for (int64_t d = t.dim() - 1; d >= 0; step *= t.size(d--)) {
    if (t.size(d) > 1 && t.stride(d) != step && t.numel() > 0) {
      refuse(kOp, ": ", name, " must be contiguous, got strides ", to_string(t.strides));
    }
  }
  return t.data;
}

// Nine tensors a layer, in this order, and three biases a layer, or none at all.
std::vector<UnfoldHeadLayer> layers_of(const UnfoldHeadParams& p, const std::vector<Tensor>& layers,
                                       const std::vector<Tensor>& biases, const Tensor& states,
                                       const Call& call) {
  const int64_t queries = p.heads * p.head_dim, keys = p.kv_heads * p.head_dim;
  std::vector<UnfoldHeadLayer> all(static_cast<size_t>(p.layers));
  for (size_t l = 0; l < all.size(); ++l) {
    const auto take = [&](const std::vector<Tensor>& list, const char* name, size_t i,
                          const char* form, const Sizes& wanted) {
      const std::string place = std::string(name) + "[" + std::to_string(i) + "]";
      return weight(place, list[i], form, wanted, states, call);
    };
    const size_t w = 9 * l, b = 3 * l;
    UnfoldHeadLayer& to = all[l];
    to.attention_norm = take(layers, "layers", w, "[D]", {p.dim});
    to.q = take(layers, "layers", w + 1, "[heads * Dh, D]", {queries, p.dim});
    to.k = take(layers, "layers", w + 2, "[kv_heads * Dh, D]", {keys, p.dim});
    to.v = take(layers, "layers", w + 3, "[kv_heads * Dh, D]", {keys, p.dim});
    to.o = take(layers, "layers", w + 4, "[D, heads * Dh]", {p.dim, queries});
    to.ffn_norm = take(layers, "layers", w + 5, "[D]", {p.dim});
    to.gate = take(layers, "layers", w + 6, "[F, D]", {p.hidden, p.dim});
    to.up = take(layers, "layers", w + 7, "[F, D]", {p.hidden, p.dim});
    to.down = take(layers, "layers", w + 8, "[D, F]", {p.dim, p.hidden});
    if (biases.empty()) continue;
    to.q_bias = take(biases, "biases", b, "[heads * Dh]", {queries});
    to.k_bias = take(biases, "biases", b + 1, "[kv_heads * Dh]", {keys});
    to.v_bias = take(biases, "biases", b + 2, "[kv_heads * Dh]", {keys});
  }
  return all;
}

// The sizes, each from the first tensor that has it.
void set_sizes(UnfoldHeadParams& p, const Tensor& states, const Tensor& tokens,
               const Tensor& positions, const std::vector<Tensor>& layers,
               const std::vector<Tensor>& biases, const Tensor& seed) {
  check_dims(kOp, "states", states, "[R, D]", 2);
  check_dtype(kOp, "states", states, kFloats);
  check_dims(kOp, "tokens", tokens, "[V, D]", 2);
  check_dims(kOp, "positions", positions, "[W, D]", 2);
  check_dims(kOp, "seed", seed, "[N]", 1);
  p.rows = states.size(0);
  p.dim = states.size(1);
  p.vocab = tokens.size(0);
  p.window = positions.size(0);
  p.pictures = seed.size(0);
  if (p.rows != p.pictures && p.rows != 2 * p.pictures) {
    refuse(kOp, ": states must be [N, D] or [2 N, D] with N = ", p.pictures, " as in seed, got ",
           to_string(states.sizes));
  }
  if (p.dim < 1) refuse(kOp, ": states must have D >= 1, got ", to_string(states.sizes));
  if (p.vocab < 1) refuse(kOp, ": tokens must have V >= 1, got ", to_string(tokens.sizes));
  if (p.heads < 1 || p.kv_heads < 1 || p.heads % p.kv_heads) {
    refuse(kOp, ": heads must be a multiple of kv_heads and both positive, got ", p.heads, " and ",
           p.kv_heads);
  }
  if (layers.size() % 9) {
    refuse(kOp, ": layers must be 9 tensors a layer, got ", layers.size());
  }
  p.layers = static_cast<int64_t>(layers.size()) / 9;
  if (!biases.empty() && biases.size() != layers.size() / 3) {
    refuse(kOp, ": biases must be none, or 3 tensors a layer = ", layers.size() / 3, ", got ",
           biases.size());
  }
  if (layers.empty()) return;
  check_dims(kOp, "layers[1]", layers[1], "[heads * Dh, D]", 2);
  check_dims(kOp, "layers[6]", layers[6], "[F, D]", 2);
  p.head_dim = layers[1].size(0) / p.heads;
  p.hidden = layers[6].size(0);
  if (p.head_dim < 2 || p.head_dim % 2) {
    refuse(kOp, ": layers[1] must be [heads * Dh, D] with Dh even, got ",
           to_string(layers[1].sizes), " for ", p.heads, " heads");
  }
}

}  // namespace

// states [N, D] or [2 N, D], tokens and classifier [V, D], positions [W, D], layers and biases as
// in layers_of, norm [D], seed [N], the rest [N] or [] -> ids int64 [N, W], valid bool [N]
std::tuple<Tensor, Tensor> unfold_head(
    Call& call, const Tensor& states, const Tensor& tokens, const Tensor& positions,
    const std::vector<Tensor>& layers, const std::vector<Tensor>& biases, const Tensor& norm,
    const Tensor& classifier, const Tensor& seed, const Tensor& position,
    const std::optional<Tensor>& guidance, const std::optional<Tensor>& temperature,
    const std::optional<Tensor>& top_k, const std::optional<Tensor>& top_p, double eps,
    double theta, int64_t heads, int64_t kv_heads, bool persistent) {
  UnfoldHeadParams p{};
  p.heads = heads;
  p.kv_heads = kv_heads;
  set_sizes(p, states, tokens, positions, layers, biases, seed);
  if (!(eps >= 0)) refuse(kOp, ": eps must be >= 0, got ", eps);
  if (!(theta > 0)) refuse(kOp, ": theta must be > 0, got ", theta);
  check_same_device(kOp, "states", states, call);
  p.tokens = weight("tokens", tokens, "[V, D]", {p.vocab, p.dim}, states, call);
  p.positions = weight("positions", positions, "[W, D]", {p.window, p.dim}, states, call);
  const std::vector<UnfoldHeadLayer> each = layers_of(p, layers, biases, states, call);
  p.layer = each.data();
  p.norm = weight("norm", norm, "[D]", {p.dim}, states, call);
  p.classifier = weight("classifier", classifier, "[V, D]", {p.vocab, p.dim}, states, call);
  set_sampling(kOp, p, p.pictures, seed, position, guidance, temperature, top_k, top_p, call);
  p.dtype = states.dtype;
  p.eps = eps;
  p.theta = theta;
  p.persistent = persistent;
  p.states = states.data;
  std::copy_n(states.strides.begin(), 2, p.states_strides);

  Tensor ids = call.empty("ids", {p.pictures, p.window}, DType::kInt64);
  Tensor valid = call.empty("valid", {p.pictures}, DType::kBool);
  if (p.pictures == 0) return {ids, valid};
  p.ids = ids.ptr<int64_t>();
  p.valid = valid.ptr<bool>();
  SYNERGEN_LAUNCH(unfold_head, p, call);
  return {ids, valid};
}

}  // namespace synergen
