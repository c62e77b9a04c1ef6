#include <algorithm>
#include <cmath>

#include "ops/ops.h"

namespace synergen {
namespace {

// int64 [B], each value in [0, most]. On a GPU nobody can look without waiting: the kernel takes
// the nearest value inside.
PerRow<int64_t> places(const char* name, const Tensor& t, int64_t batch, int64_t most, Call& call) {
  const char* op = "decode_attention";
  check_shape(op, name, t, "[B]", {batch});
  check_dtype(op, name, t, {DType::kInt64});
  check_same_device(op, name, t, call);
  const PerRow<int64_t> values{t.ptr<int64_t>(), t.stride(0)};
  for (int64_t row = 0; !call.device.cuda && row < batch; ++row) {
    const int64_t value = values.at(row, 0);
    if (value < 0 || value > most) {
      refuse(op, ": ", name, " must be in [0, S] = [0, ", most, "], got ", value, " in row ", row);
    }
  }
  return values;
}

}  // namespace

// q [B, Hq, Dh], k_cache and v_cache [B, S, Hkv, Dh], lengths and starts [B] -> out [B, Hq, Dh]
Tensor decode_attention(Call& call, const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                        const Tensor& lengths, const std::optional<Tensor>& starts,
                        const std::optional<double>& scale) {
  const char* op = "decode_attention";
  check_dims(op, "q", q, "[B, Hq, Dh]", 3);
  check_dtype(op, "q", q, kFloats);
  check_same_device(op, "q", q, call);
  check_dims(op, "k_cache", k_cache, "[B, S, Hkv, Dh]", 4);
  DecodeAttentionParams p{};
  p.dtype = q.dtype;
  p.batch = q.size(0);
  p.heads = q.size(1);
  p.dim = q.size(2);
  p.keys = k_cache.size(1);
  p.kv_heads = k_cache.size(2);
  const Sizes wanted = {p.batch, p.keys, p.kv_heads, p.dim};
  check_shape(op, "k_cache", k_cache, "[B, S, Hkv, Dh]", wanted);
  check_shape(op, "v_cache", v_cache, "as k_cache", wanted);
  check_same_dtype(op, "k_cache", k_cache, "q", q);
  check_same_dtype(op, "v_cache", v_cache, "q", q);
  check_same_device(op, "k_cache", k_cache, call);
  check_same_device(op, "v_cache", v_cache, call);
  if (p.kv_heads < 1 || p.heads % p.kv_heads != 0) {
    refuse(op, ": Hq must be a multiple of Hkv, got ", p.heads, " and ", p.kv_heads);
  }
  p.lengths = places("lengths", lengths, p.batch, p.keys, call);
  if (starts) p.starts = places("starts", *starts, p.batch, p.keys, call);
  p.scale = scale.value_or(1 / std::sqrt(static_cast<double>(p.dim)));
  if (!std::isfinite(p.scale) && p.dim > 0) refuse(op, ": scale must be finite, got ", p.scale);

  Tensor out = call.empty("out", q.sizes, q.dtype);
  if (out.numel() == 0) return out;
  p.q = q.data;
  p.k = k_cache.data;
  p.v = v_cache.data;
  std::copy_n(q.strides.begin(), 3, p.q_strides);
  std::copy_n(k_cache.strides.begin(), 4, p.k_strides);
  std::copy_n(v_cache.strides.begin(), 4, p.v_strides);
  p.out = out.data;
  SYNERGEN_LAUNCH(decode_attention, p, call);
  return out;
}

}  // namespace synergen
