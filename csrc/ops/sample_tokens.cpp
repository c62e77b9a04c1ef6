#include <algorithm>
#include <cmath>

#include "ops/ops.h"

namespace synergen {
namespace {

// An argument of shape [R], or [] for all rows alike, or none. ok(value) is false for what cannot
// be meant; a CUDA kernel cannot look first and calls such a row invalid.
template <class T, class F>
PerRow<T> per_row(const char* name, const std::optional<Tensor>& t, int64_t rows, DType dtype,
                  Call& call, const char* wanted, const F& ok) {
  if (!t) return {};
  check_dtype("sample_tokens", name, *t, {dtype});
  check_same_device("sample_tokens", name, *t, call);
  if (t->dim() != 0) check_shape("sample_tokens", name, *t, "[] or [R]", {rows});
  const PerRow<T> values{t->ptr<T>(), t->dim() ? t->stride(0) : 0};
  for (int64_t r = 0; !call.device.cuda && r < (t->dim() ? rows : 1); ++r) {
    const T value = values.at(r, T{});
    if (!ok(value)) {
      refuse("sample_tokens: ", name, " must be ", wanted, ", got ", value, " in row ", r);
    }
  }
  return values;
}

}  // namespace

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
  check_shape(op, "seed", seed, "[R]", {p.rows});
  const auto any = [](int64_t) { return true; };
  const auto finite = [](double x) { return std::isfinite(x); };
  p.seed = per_row<int64_t>("seed", seed, p.rows, DType::kInt64, call, "", any);
  p.position = per_row<int64_t>("position", position, p.rows, DType::kInt64, call, "", any);
  p.guidance =
      per_row<double>("guidance", guidance, p.rows, DType::kFloat64, call, "finite", finite);
  p.temperature =
      per_row<double>("temperature", temperature, p.rows, DType::kFloat64, call, "finite and >= 0",
                      [](double x) { return std::isfinite(x) && x >= 0; });
  p.top_k = per_row<int64_t>("top_k", top_k, p.rows, DType::kInt64, call, ">= 0 (0: off)",
                             [](int64_t x) { return x >= 0; });
  p.top_p = per_row<double>("top_p", top_p, p.rows, DType::kFloat64, call, "in [0, 1]",
                            [](double x) { return x >= 0 && x <= 1; });

  Tensor ids = call.empty("ids", {p.rows}, DType::kInt64);
  Tensor valid = call.empty("valid", {p.rows}, DType::kBool);
  if (p.rows == 0) return {ids, valid};
  p.ids = ids.ptr<int64_t>();
  p.valid = valid.ptr<bool>();
  SYNERGEN_LAUNCH(sample_tokens, p, call);
  return {ids, valid};
}

}  // namespace synergen
