#include <algorithm>

#include "ops/ops.h"
#include "ops/sampling.h"

namespace synergen {

// logits and uncond_logits [R, V], seed [R], the rest [R] or [] -> ids int64 [R], valid bool [R]
std::tuple<Tensor, Tensor> sample_tokens(Call& call, const Tensor& logits, const Tensor& seed,
                                         const Tensor& position,
                                         const std::optional<Tensor>& uncond_logits,
                                         const std::optional<Tensor>& guidance,
                                         const std::optional<Tensor>& temperature,
                                         const std::optional<Tensor>& top_k,
                                         const std::optional<Tensor>& top_p) {
  const char* op = "sample_tokens";
  check_dims(op, "logits", logits, "[R, V]", 2);
  check_dtype(op, "logits", logits, kFloats);
  check_same_device(op, "logits", logits, call);
  SampleTokensParams p{};
  p.dtype = logits.dtype;
  p.rows = logits.size(0);
  p.vocab = logits.size(1);
  if (p.vocab < 1) refuse(op, ": logits must be [R, V] with V >= 1, got ", to_string(logits.sizes));
  p.logits = logits.data;
  std::copy_n(logits.strides.begin(), 2, p.logits_strides);
  if (uncond_logits) {
    check_shape(op, "uncond_logits", *uncond_logits, "as logits", logits.sizes);
    check_same_dtype(op, "uncond_logits", *uncond_logits, "logits", logits);
    check_same_device(op, "uncond_logits", *uncond_logits, call);
    p.uncond = uncond_logits->data;
    std::copy_n(uncond_logits->strides.begin(), 2, p.uncond_strides);
  }
  set_sampling(op, p, p.rows, seed, position, guidance, temperature, top_k, top_p, call);

  Tensor ids = call.empty("ids", {p.rows}, DType::kInt64);
  Tensor valid = call.empty("valid", {p.rows}, DType::kBool);
  if (p.rows == 0) return {ids, valid};
  p.ids = ids.ptr<int64_t>();
  p.valid = valid.ptr<bool>();
  SYNERGEN_LAUNCH(sample_tokens, p, call);
  return {ids, valid};
}

}  // namespace synergen
