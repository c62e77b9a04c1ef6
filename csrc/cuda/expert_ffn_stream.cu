// expert_ffn for at most 64 pairs of token and expert: expert_ffn_stream.cuh with plain weights.
#include "cuda/expert_ffn.h"
#include "cuda/expert_ffn_stream.cuh"

namespace synergen::cuda {
namespace {

// f(Type<T>, Type<W>): weights have the dtype of x, or float32.
template <class F>
void dispatch(const ExpertFfnParams& p, F&& f) {
  dispatch_float(p.dtype, [&](auto tag) {
    if (p.expert_dtype == p.dtype) {
      f(tag, tag);
    } else {
      f(tag, Type<float>{});
    }
  });
}

stream::Matrix matrix(const void* data, const int64_t (&strides)[3]) {
  return {data, {strides[0], strides[1], strides[2]}, nullptr, {}};
}

}  // namespace

bool streams(const ExpertFfnParams& p) {
  return p.tokens * p.top_k <= stream::kMostPairs && p.y != nullptr && p.gate_pre == nullptr;
}

int64_t expert_ffn_stream_scratch(const ExpertFfnParams& p) {
  int64_t bytes = 0;
  dispatch(p, [&](auto x, auto weights) {
    bytes =
        stream::scratch_of<typename decltype(x)::type, typename decltype(weights)::type>(p).all();
  });
  return bytes;
}

void expert_ffn_stream(const ExpertFfnParams& p, void* stream) {
  dispatch(p, [&](auto x, auto weights) {
    stream::launch_ffn<typename decltype(x)::type, typename decltype(weights)::type>(
        "expert_ffn", p, matrix(p.gate, p.gate_strides), matrix(p.up, p.up_strides),
        matrix(p.down, p.down_strides), 0, 0, p.scratch, stream);
  });
}

}  // namespace synergen::cuda
