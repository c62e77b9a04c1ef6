#include <algorithm>

#include "ops/ops.h"

namespace synergen {
namespace {

void check_fold(const char* op, int64_t h, int64_t w, int64_t m, int64_t n) {
  if (h < 0 || w < 0) refuse(op, ": h and w must not be negative, got h=", h, ", w=", w);
  if (m < 1 || n < 1) refuse(op, ": m and n must be at least 1, got m=", m, ", n=", n);
  if (h % m || w % n) {
    refuse(op, ": m x n windows must tile h x w, got m=", m, ", n=", n, " for h=", h, ", w=", w);
  }
}

// On the CPU an id outside the table is refused; a CUDA kernel cannot stop its caller and writes
// NaN instead, and
// adds its gradient to no row.
void check_ids(const char* op, const FoldTokensParams& p) {
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t r = 0; r < p.h; ++r) {
      for (int64_t c = 0; c < p.w; ++c) {
        const int64_t id =
            p.ids[b * p.ids_strides[0] + r * p.ids_strides[1] + c * p.ids_strides[2]];
        if (id < 0 || id >= p.vocab) {
          refuse(op, ": ids must be in [0, V=", p.vocab, "), got ", id, " at [", b, ", ", r, ", ",
                 c, "]");
        }
      }
    }
  }
}

FoldTokensParams ids_params(const char* op, const Tensor& ids, int64_t m, int64_t n) {
  check_dims(op, "ids", ids, "[N, h, w]", 3);
  check_dtype(op, "ids", ids, {DType::kInt64});
  check_fold(op, ids.size(1), ids.size(2), m, n);
  FoldTokensParams p{};
  p.batch = ids.size(0);
  p.h = ids.size(1);
  p.w = ids.size(2);
  p.m = m;
  p.n = n;
  p.ids = ids.ptr<int64_t>();
  std::copy_n(ids.strides.begin(), 3, p.ids_strides);
  return p;
}

}  // namespace

// ids [N, h, w], table [V, d], pos [h, w, d] -> y [N, (h / m) * (w / n), m * n * d]
Tensor fold_tokens(Call& call, const Tensor& ids, const Tensor& table, const Tensor& pos, int64_t m,
                   int64_t n) {
  FoldTokensParams p = ids_params("fold_tokens", ids, m, n);
  check_dims("fold_tokens", "table", table, "[V, d]", 2);
  check_dtype("fold_tokens", "table", table, kFloats);
  p.dtype = table.dtype;
  p.vocab = table.size(0);
  p.dim = table.size(1);
  check_shape("fold_tokens", "pos", pos, "[h, w, d]", {p.h, p.w, p.dim});
  check_same_dtype("fold_tokens", "pos", pos, "table", table);
  check_same_device("fold_tokens", "table", table, call);
  check_same_device("fold_tokens", "pos", pos, call);
  if (!call.device.cuda) check_ids("fold_tokens", p);

  Tensor y = call.empty("y", {p.batch, (p.h / m) * (p.w / n), m * n * p.dim}, table.dtype);
  if (y.numel() == 0) return y;

  p.table = table.data;
  std::copy_n(table.strides.begin(), 2, p.table_strides);
  p.pos = pos.data;
  std::copy_n(pos.strides.begin(), 3, p.pos_strides);
  p.y = y.data;
  SYNERGEN_LAUNCH(fold_tokens, p, call);
  return y;
}

// dy [N, (h / m) * (w / n), m * n * d], ids [N, h, w] -> dtable [V, d], dpos [h, w, d]
std::tuple<Tensor, Tensor> fold_tokens_backward(Call& call, const Tensor& dy, const Tensor& ids,
                                                int64_t vocab, int64_t m, int64_t n) {
  FoldTokensBackwardParams p{};
  static_cast<FoldTokensParams&>(p) = ids_params("fold_tokens_backward", ids, m, n);
  check_dims("fold_tokens_backward", "dy", dy, "[N, (h / m) * (w / n), m * n * d]", 3);
  check_dtype("fold_tokens_backward", "dy", dy, kFloats);
  check_same_device("fold_tokens_backward", "ids", ids, call);
  p.dtype = dy.dtype;
  p.vocab = vocab;
  p.dim = dy.size(2) / (m * n);
  check_shape("fold_tokens_backward", "dy", dy, "[N, (h / m) * (w / n), m * n * d]",
              {p.batch, (p.h / m) * (p.w / n), m * n * p.dim});
  if (!call.device.cuda) check_ids("fold_tokens_backward", p);

  Tensor dtable = call.empty("dtable", {vocab, p.dim}, dy.dtype);
  Tensor dpos = call.empty("dpos", {p.h, p.w, p.dim}, dy.dtype);
  if (dtable.numel() == 0 && dpos.numel() == 0) return {dtable, dpos};

  p.dy = dy.data;
  std::copy_n(dy.strides.begin(), 3, p.dy_strides);
  p.dtable = dtable.data;
  p.dpos = dpos.data;
  SYNERGEN_LAUNCH(fold_tokens_backward, p, call);
  return {dtable, dpos};
}

namespace {

// Both directions between the raster [N, h, w] and its windows [N, (h / m) * (w / n), m * n].
Tensor reorder(Call& call, const Tensor& ids, int64_t h, int64_t w, int64_t m, int64_t n,
               bool unfold) {
  const int64_t batch = ids.size(0), windows = (h / m) * (w / n);
  Tensor y =
      call.empty("ids", unfold ? Sizes{batch, h, w} : Sizes{batch, windows, m * n}, ids.dtype);
  if (y.numel() == 0) return y;
  FoldIdsParams p{batch, h, w, m, n, ids.ptr<int64_t>(), {}, y.ptr<int64_t>(), unfold};
  std::copy_n(ids.strides.begin(), 3, p.strides);
  SYNERGEN_LAUNCH(fold_ids, p, call);
  return y;
}

}  // namespace

// ids [N, h, w] -> [N, (h / m) * (w / n), m * n]
Tensor fold_ids(Call& call, const Tensor& ids, int64_t m, int64_t n) {
  check_dims("fold_ids", "ids", ids, "[N, h, w]", 3);
  check_dtype("fold_ids", "ids", ids, {DType::kInt64});
  check_fold("fold_ids", ids.size(1), ids.size(2), m, n);
  return reorder(call, ids, ids.size(1), ids.size(2), m, n, false);
}

// ids [N, (h / m) * (w / n), m * n] -> [N, h, w]
Tensor unfold_ids(Call& call, const Tensor& ids, int64_t h, int64_t w, int64_t m, int64_t n) {
  check_dims("unfold_ids", "ids", ids, "[N, (h / m) * (w / n), m * n]", 3);
  check_dtype("unfold_ids", "ids", ids, {DType::kInt64});
  check_fold("unfold_ids", h, w, m, n);
  check_shape("unfold_ids", "ids", ids, "[N, (h / m) * (w / n), m * n]",
              {ids.size(0), (h / m) * (w / n), m * n});
  return reorder(call, ids, h, w, m, n, true);
}

}  // namespace synergen
