#include "ops/ops.h"

namespace synergen {
namespace {

// Strides of positions as if broadcast to the leading dimensions of q, from the right.
Tensor broadcast_positions(const Tensor& positions, const Sizes& tokens) {
  const int64_t missing = static_cast<int64_t>(tokens.size()) - positions.dim();
  bool fits = missing >= 0;
  Tensor wide = positions;
  wide.sizes = tokens;
  wide.strides.assign(tokens.size(), 0);
  for (int64_t d = 0; fits && d < positions.dim(); ++d) {
    if (positions.sizes[d] != 1) wide.strides[d + missing] = positions.strides[d];
    fits = positions.sizes[d] == 1 || positions.sizes[d] == tokens[d + missing];
  }
  if (!fits) {
    refuse("rope: positions must be [..., T] = ", to_string(tokens), " or broadcast to it, got ",
           to_string(positions.sizes));
  }
  return wide;
}

RopeParams::Part part_of(const Tensor& x, const Tensor& y) {
  return {x.size(-2), x.data, leading_rows(x, 2), x.stride(-2), x.stride(-1), y.data};
}

}  // namespace

// q [..., T, Hq, Dh], k [..., T, Hk, Dh], positions [..., T] -> q, k rotated
std::tuple<Tensor, Tensor> rope(Call& call, const Tensor& q, const Tensor& k,
                                const Tensor& positions, double theta, bool inverse) {
  check_min_dims("rope", "q", q, "[..., T, Hq, Dh]", 3);
  check_dtype("rope", "q", q, kFloats);
  check_same_dtype("rope", "k", k, "q", q);
  Sizes like_q = q.sizes;
  if (k.dim() == q.dim()) like_q[k.dim() - 2] = k.size(-2);
  check_shape("rope", "k", k, "[..., T, Hk, Dh]", like_q);
  check_dtype("rope", "positions", positions, {DType::kInt64});
  check_same_device("rope", "k", k, call);
  check_same_device("rope", "positions", positions, call);
  if (q.size(-1) % 2) refuse("rope: Dh must be even, got ", q.size(-1));
  if (!(theta > 0)) refuse("rope: theta must be > 0, got ", theta);
  const Tensor wide = broadcast_positions(positions, Sizes(q.sizes.begin(), q.sizes.end() - 2));

  Tensor q_out = call.empty("q", q.sizes, q.dtype);
  Tensor k_out = call.empty("k", k.sizes, k.dtype);
  if (q_out.numel() == 0 && k_out.numel() == 0) return {q_out, k_out};

  RopeParams p{};
  p.dtype = q.dtype;
  p.tokens = leading_count(q, 2);
  p.dim = q.size(-1);
  p.theta = theta;
  p.inverse = inverse;
  p.positions = wide.ptr<int64_t>();
  p.position_rows = leading_rows(wide, 0);
  p.parts[0] = part_of(q, q_out);
  p.parts[1] = part_of(k, k_out);
  SYNERGEN_LAUNCH(rope, p, call);
  return {q_out, k_out};
}

}  // namespace synergen
