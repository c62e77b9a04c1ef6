// expert_ffn_quantized: expert_ffn_stream.cuh with weights of 8 or 4 bits, for any number of pairs.
#include "cuda/expert_ffn_stream.cuh"

namespace synergen::cuda {
namespace {

template <class F>
void dispatch(const ExpertFfnQuantizedParams& p, F&& f) {
  dispatch_float(p.dtype, [&](auto tag) {
    if (p.expert_dtype == DType::kInt8) {
      f(tag, Type<int8_t>{});
    } else {
      f(tag, Type<stream::Nibbles>{});
    }
  });
}

stream::Matrix matrix(const void* data, const int64_t (&strides)[3], const void* scale,
                      const int64_t (&scale_strides)[3]) {
  return {data,
          {strides[0], strides[1], strides[2]},
          scale,
          {scale_strides[0], scale_strides[1], scale_strides[2]}};
}

// csrc/ops has seen to it that a group is the whole row or a power of two.
int log2_of(int64_t group, int64_t row) {
  return group == row ? 31 : __builtin_ctzll(static_cast<unsigned long long>(group));
}

}  // namespace

int64_t scratch_bytes(const ExpertFfnQuantizedParams& p) {
  int64_t bytes = 0;
  dispatch(p, [&](auto x, auto weights) {
    bytes =
        stream::scratch_of<typename decltype(x)::type, typename decltype(weights)::type>(p).all();
  });
  return bytes;
}

void expert_ffn_quantized(const ExpertFfnQuantizedParams& p, void* stream) {
  dispatch(p, [&](auto x, auto weights) {
    stream::launch_ffn<typename decltype(x)::type, typename decltype(weights)::type>(
        "expert_ffn_quantized", p,
        matrix(p.gate, p.gate_strides, p.gate_scale, p.gate_scale_strides),
        matrix(p.up, p.up_strides, p.up_scale, p.up_scale_strides),
        matrix(p.down, p.down_strides, p.down_scale, p.down_scale_strides),
        log2_of(p.gate_group, p.dim), log2_of(p.down_group, p.hidden), p.scratch, stream);
  });
}

}  // namespace synergen::cuda
