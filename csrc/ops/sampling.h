// How ids are drawn, as arguments of an op: sample_tokens and unfold_head take the same.
#pragma once

#include <cmath>

#include "ops/ops.h"

namespace synergen {

// An argument of shape [R], or [] for all rows alike, or none. ok(value) is false for what cannot
// be meant; a CUDA kernel cannot look first and calls such a row invalid.
template <class T, class F>
PerRow<T> per_row(const char* op, const char* name, const std::optional<Tensor>& t, int64_t rows,
                  DType dtype, Call& call, const char* wanted, const F& ok) {
  if (!t) return {};
  check_dtype(op, name, *t, {dtype});
  check_same_device(op, name, *t, call);
  if (t->dim() != 0) check_shape(op, name, *t, "[] or [R]", {rows});
  const PerRow<T> values{t->ptr<T>(), t->dim() ? t->stride(0) : 0};
  for (int64_t r = 0; !call.device.cuda && r < (t->dim() ? rows : 1); ++r) {
    const T value = values.at(r, T{});
    if (!ok(value)) refuse(op, ": ", name, " must be ", wanted, ", got ", value, " in row ", r);
  }
  return values;
}

// Params: with seed, position, guidance, temperature, top_k and top_p, each a PerRow. seed is [R].
template <class Params>
void set_sampling(const char* op, Params& p, int64_t rows, const Tensor& seed,
                  const Tensor& position, const std::optional<Tensor>& guidance,
                  const std::optional<Tensor>& temperature, const std::optional<Tensor>& top_k,
                  const std::optional<Tensor>& top_p, Call& call) {
  check_shape(op, "seed", seed, "[R]", {rows});
  const auto any = [](int64_t) { return true; };
  const auto finite = [](double x) { return std::isfinite(x); };
  p.seed = per_row<int64_t>(op, "seed", seed, rows, DType::kInt64, call, "", any);
  p.position = per_row<int64_t>(op, "position", position, rows, DType::kInt64, call, "", any);
  p.guidance =
      per_row<double>(op, "guidance", guidance, rows, DType::kFloat64, call, "finite", finite);
  p.temperature =
      per_row<double>(op, "temperature", temperature, rows, DType::kFloat64, call,
                      "finite and >= 0", [](double x) { return std::isfinite(x) && x >= 0; });
  p.top_k = per_row<int64_t>(op, "top_k", top_k, rows, DType::kInt64, call, ">= 0 (0: off)",
                             [](int64_t x) { return x >= 0; });
  p.top_p = per_row<double>(op, "top_p", top_p, rows, DType::kFloat64, call, "in [0, 1]",
                            [](double x) { return x >= 0 && x <= 1; });
}

}  // namespace synergen
