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

std::tuple<Tensor, Tensor> rope(Call& call, const Tensor& q, const Tensor& k,
                                const Tensor& positions, double theta, bool inverse);

Tensor fold_tokens(Call& call, const Tensor& ids, const Tensor& table, const Tensor& pos, int64_t m,
                   int64_t n);
std::tuple<Tensor, Tensor> fold_tokens_backward(Call& call, const Tensor& dy, const Tensor& ids,
                                                int64_t vocab, int64_t m, int64_t n);
Tensor fold_ids(Call& call, const Tensor& ids, int64_t m, int64_t n);
Tensor unfold_ids(Call& call, const Tensor& ids, int64_t h, int64_t w, int64_t m, int64_t n);

}  // namespace synergen
