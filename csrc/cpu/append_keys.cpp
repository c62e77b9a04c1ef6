// append_keys on the CPU.
#include "cpu/parallel.h"
#include "cpu/rotate.h"
#include "engine/params.h"

namespace synergen::cpu::SYNERGEN_ISA {
void append_keys(const AppendKeysParams& p) {
  const int64_t dim = p.head_dim, half = dim / 2, keys = p.kv_heads * dim;
  const int64_t step = p.heads * dim + 2 * keys;
  parallel_for(p.rows, ceil_div(65536, step), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      float* q = p.qkv + r * step;
      const float* k = q + p.heads * dim;
      const float *c = p.cosines + p.positions[r] * half, *s = p.sines + p.positions[r] * half;
      const int64_t at = p.sequences[r] * p.sequence_step + p.positions[r] * keys;
      for (int64_t h = 0; h < p.heads; ++h) rotate_head(q + h * dim, half, c, s, q + h * dim);
      for (int64_t h = 0; h < p.kv_heads; ++h)
        rotate_head(k + h * dim, half, c, s, p.keys + at + h * dim);
      std::memcpy(p.values + at, k + keys, keys * sizeof(float));
    }
  });
}

}  // namespace synergen::cpu::SYNERGEN_ISA
