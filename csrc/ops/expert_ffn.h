// What the ops of expert_ffn share, whatever their weights are stored in.
#pragma once

#include <algorithm>
#include <string>
#include <tuple>
#include <utility>

#include "common/check.h"
#include "kernels.h"

namespace synergen {

// expert_index, [T] or [T, k], into p, whose tokens are known.
template <class Params>
void read_index(const char* op, Call& call, const Tensor& index, Params& p) {
  check_dtype(op, "expert_index", index, {DType::kInt64});
  p.top_k = index.dim() == 2 ? index.size(1) : 1;
  check_shape(op, "expert_index", index, index.dim() == 2 ? "[T, k]" : "[T]",
              index.dim() == 2 ? Sizes{p.tokens, p.top_k} : Sizes{p.tokens});
  check_same_device(op, "expert_index", index, call);
  p.index = index.ptr<int64_t>();
  std::copy_n(index.strides.begin(), index.dim(), p.index_strides);
  // A CUDA kernel cannot refuse an index without a word to the host; it makes NaN of the results.
  for (int64_t t = 0; t < p.tokens && !call.device.cuda; ++t) {
    for (int64_t j = 0; j < p.top_k; ++j) {
      const int64_t e = p.index[t * p.index_strides[0] + j * p.index_strides[1]];
      if (e < 0) {
        refuse(op, ": expert_index must not be negative, got ", e, " at [", t,
               index.dim() == 2 ? ", " + std::to_string(j) : "", "]");
      }
    }
  }
}

// expert_index and expert_weight, [T] or [T, k], into p, whose tokens are known.
inline void read_routing(const char* op, Call& call, const Tensor& x, const Tensor& index,
                         const std::optional<Tensor>& weight, ExpertFfnParams& p) {
  read_index(op, call, index, p);
  if (!weight) return;
  check_shape(op, "expert_weight", *weight, "as expert_index", index.sizes);
  if (weight->dtype != DType::kFloat32) check_same_dtype(op, "expert_weight", *weight, "x", x);
  check_same_device(op, "expert_weight", *weight, call);
  p.weight = weight->data;
  p.weight_dtype = weight->dtype;
  std::copy_n(weight->strides.begin(), weight->dim(), p.weight_strides);
}

// What route_tokens made of the index, [T * k] and [E + 1], into p; or neither.
inline void read_order(const char* op, Call& call, const std::optional<Tensor>& order,
                       const std::optional<Tensor>& offsets, ExpertFfnParams& p) {
  if (order.has_value() != offsets.has_value()) {
    refuse(op, ": order and offsets must come together or not at all");
  }
  if (!order) return;
  for (const auto& [name, t, shape, size] :
       {std::tuple{"order", &*order, "[T * k]", p.tokens * p.top_k},
        std::tuple{"offsets", &*offsets, "[E + 1]", p.experts + 1}}) {
    check_shape(op, name, *t, shape, {size});
    check_dtype(op, name, *t, {DType::kInt32});
    check_same_device(op, name, *t, call);
    if (t->strides[0] != 1 && size > 1) {
      refuse(op, ": ", name, " must be contiguous, got strides ", to_string(t->strides));
    }
  }
  p.routed_order = order->ptr<int32_t>();
  p.routed_offsets = offsets->ptr<int32_t>();
}

// A sum over nothing is zero. CUDA kernels find that out for themselves.
inline void fill_zero(const Tensor& t) {
  const int64_t size = t.dtype == DType::kFloat64 ? 8 : t.dtype == DType::kFloat32 ? 4 : 2;
  std::fill_n(static_cast<char*>(t.data), t.numel() * size, 0);
}

}  // namespace synergen
