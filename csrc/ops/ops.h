// The host functions: one per op, called from torch and from plain arrays alike (see Call in
// common/tensor.h).
#pragma once

#include "common/check.h"
#include "common/tensor.h"
#include "kernels.h"
#include "ops/device.h"

namespace synergen {

Tensor rms_norm(Call& call, const Tensor& x, const Tensor& weight, double eps);
std::tuple<Tensor, Tensor> rms_norm_backward(Call& call, const Tensor& dy, const Tensor& x,
                                             const Tensor& weight, double eps);

std::tuple<Tensor, Tensor> add_rms_norm(Call& call, const Tensor& x, const Tensor& residual,
                                        const Tensor& weight, double eps);
std::tuple<Tensor, Tensor> add_rms_norm_backward(Call& call, const Tensor& dy, const Tensor& dsum,
                                                 const Tensor& sum, const Tensor& weight,
                                                 double eps);

std::tuple<Tensor, Tensor> rope(Call& call, const Tensor& q, const Tensor& k,
                                const Tensor& positions, double theta, bool inverse);

Tensor fold_tokens(Call& call, const Tensor& ids, const Tensor& table, const Tensor& pos, int64_t m,
                   int64_t n);
std::tuple<Tensor, Tensor> fold_tokens_backward(Call& call, const Tensor& dy, const Tensor& ids,
                                                int64_t vocab, int64_t m, int64_t n);
Tensor fold_ids(Call& call, const Tensor& ids, int64_t m, int64_t n);
Tensor unfold_ids(Call& call, const Tensor& ids, int64_t h, int64_t w, int64_t m, int64_t n);

std::tuple<Tensor, Tensor> route_tokens(Call& call, const Tensor& expert_index, int64_t experts);
Tensor expert_ffn(Call& call, const Tensor& x, const Tensor& gate, const Tensor& up,
                  const Tensor& down, const Tensor& expert_index,
                  const std::optional<Tensor>& expert_weight, const std::optional<Tensor>& order,
                  const std::optional<Tensor>& offsets);
std::tuple<Tensor, Tensor, Tensor> expert_ffn_train(Call& call, const Tensor& x, const Tensor& gate,
                                                    const Tensor& up, const Tensor& down,
                                                    const Tensor& expert_index,
                                                    const std::optional<Tensor>& expert_weight,
                                                    const std::optional<Tensor>& order,
                                                    const std::optional<Tensor>& offsets);
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> expert_ffn_backward(
    Call& call, const Tensor& dy, const Tensor& x, const Tensor& gate, const Tensor& up,
    const Tensor& down, const Tensor& expert_index, const std::optional<Tensor>& expert_weight,
    const std::optional<Tensor>& gate_pre, const std::optional<Tensor>& up_pre, bool need_x,
    bool need_experts, bool need_weight, const std::optional<Tensor>& order,
    const std::optional<Tensor>& offsets);

Tensor expert_ffn_quantized(Call& call, const Tensor& x, const Tensor& gate, const Tensor& up,
                            const Tensor& down, const Tensor& gate_scale, const Tensor& up_scale,
                            const Tensor& down_scale, const Tensor& expert_index,
                            const std::optional<Tensor>& expert_weight);
Tensor decode_attention(Call& call, const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                        const Tensor& lengths, const std::optional<Tensor>& starts,
                        const std::optional<double>& scale);
std::tuple<Tensor, Tensor> linear_cross_entropy(Call& call, const Tensor& x, const Tensor& weight,
                                                const Tensor& targets, int64_t ignore_index);
std::tuple<Tensor, Tensor> linear_cross_entropy_backward(Call& call, const Tensor& dloss,
                                                         const Tensor& x, const Tensor& weight,
                                                         const Tensor& targets, const Tensor& lse,
                                                         int64_t ignore_index, bool need_x,
                                                         bool need_weight);

std::tuple<Tensor, Tensor> sample_tokens(Call& call, const Tensor& logits, const Tensor& seed,
                                         const Tensor& position,
                                         const std::optional<Tensor>& uncond_logits,
                                         const std::optional<Tensor>& guidance,
                                         const std::optional<Tensor>& temperature,
                                         const std::optional<Tensor>& top_k,
                                         const std::optional<Tensor>& top_p);

std::tuple<Tensor, Tensor> unfold_head(
    Call& call, const Tensor& states, const Tensor& tokens, const Tensor& positions,
    const std::vector<Tensor>& layers, const std::vector<Tensor>& biases, const Tensor& norm,
    const Tensor& classifier, const Tensor& seed, const Tensor& position,
    const std::optional<Tensor>& guidance, const std::optional<Tensor>& temperature,
    const std::optional<Tensor>& top_k, const std::optional<Tensor>& top_p, double eps,
    double theta, int64_t heads, int64_t kv_heads, bool persistent);

}  // namespace synergen
