// expert_ffn on the CPU and its gradients, in double for double and in float for everything
// shorter.
#include "cpu/expert_ffn_backward.h"
#include "cpu/expert_ffn_forward.h"

namespace synergen::cpu::SYNERGEN_ISA {

void expert_ffn(const ExpertFfnParams& p) {
  if (p.dtype == DType::kFloat64) {
    ExpertFfnForward<double>(p).run();
  } else {
    ExpertFfnForward<float>(p).run();
  }
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
  if (p.dtype == DType::kFloat64) {
    ExpertFfnBackward<double>(q).run();
  } else {
    ExpertFfnBackward<float>(q).run();
  }
}

}  // namespace synergen::cpu::SYNERGEN_ISA
