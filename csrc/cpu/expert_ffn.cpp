// expert_ffn on the CPU and its gradients, in double for double and in float for everything
// shorter; products in pairs of bfloat16 where the CPU has them.
#include "cpu/expert_ffn_backward.h"
#include "cpu/expert_ffn_forward.h"

namespace synergen::cpu::SYNERGEN_ISA {

namespace {

// f(tag) with the packed number of the products: see gemm.h.
template <class F>
void with_packed(const ExpertFfnParams& p, const F& f) {
  if (p.dtype == DType::kFloat64) return f(Type<double>{});
#if defined(__AVX512BF16__)
  // Odd sizes would split a pair between two rows.
  if (p.dtype == DType::kBFloat16 && p.expert_dtype == DType::kBFloat16 && p.dim % 2 == 0 &&
      p.hidden % 2 == 0) {
    return f(Type<Pair>{});
  }
#endif
  f(Type<float>{});
}

}  // namespace

void expert_ffn(const ExpertFfnParams& p) {
  with_packed(p, [&](auto tag) { ExpertFfnForward<typename decltype(tag)::type>(p).run(); });
}

void expert_ffn_backward(const ExpertFfnBackwardParams& p) {
  const bool again = !p.gate_pre;
  const int64_t bytes = again ? p.tokens * p.top_k * p.hidden * size_of(p.dtype) : 0;
  Scratch<char> gate_pre(bytes), up_pre(bytes);
  ExpertFfnBackwardParams q = p;
  if (again) {
    q.y = nullptr;
    q.gate_pre = gate_pre.data();
    q.up_pre = up_pre.data();
    expert_ffn(static_cast<const ExpertFfnParams&>(q));
  }
  with_packed(q, [&](auto tag) { ExpertFfnBackward<typename decltype(tag)::type>(q).run(); });
}

}  // namespace synergen::cpu::SYNERGEN_ISA
