// cpu::<kernel>: the best instruction set that was compiled, that this CPU has and that
// SYNERGEN_ISA allows.
#include "cpu/dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace synergen::cpu {
namespace {

constexpr Isa kIsas[] = {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16};

bool has(Isa isa) {
  switch (isa) {
    case Isa::kBaseline:
      return true;
#if defined(SYNERGEN_HAS_AVX2)
    // The compiler's run-time check asks the operating system too (XCR0), not only CPUID.
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
    case Isa::kAvx512:
      return has(Isa::kAvx2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512dq");
    case Isa::kAvx512Bf16:
      return has(Isa::kAvx512) && __builtin_cpu_supports("avx512bf16") &&
             __builtin_cpu_supports("avx512vnni");
#endif
    default:
      return false;
  }
}

Isa choose() {
  const char* wanted = std::getenv("SYNERGEN_ISA");
  if (!wanted || !*wanted) {
    Isa best = Isa::kBaseline;
    for (Isa isa : kIsas) best = has(isa) ? isa : best;
    return best;
  }
  for (Isa isa : kIsas) {
    if (name_of(isa) == std::string(wanted) && has(isa)) return isa;
  }
  std::string list;
  for (const std::string& name : available_isas()) list += (list.empty() ? "" : ", ") + name;
  throw std::runtime_error("SYNERGEN_ISA must be one of " + list + " on this CPU, got " + wanted);
}

}  // namespace

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::kAvx512Bf16:
      return "avx512bf16";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "baseline";
  }
}

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names = {"baseline"};
#if defined(SYNERGEN_HAS_AVX2)
  names.insert(names.end(), {"avx2", "avx512", "avx512bf16"});
#endif
  return names;
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (Isa isa : kIsas) {
    if (has(isa)) names.push_back(name_of(isa));
  }
  return names;
}

// Read once: a process keeps one instruction set, so that its results do not change under it.
Isa current_isa() {
  static const Isa isa = choose();
  return isa;
}

Isa isa_of(const std::string& kernel) {
  if (current_isa() != Isa::kAvx512Bf16) return current_isa();
#define SYNERGEN_IF(name, Params) \
  if (kernel == #name) return Isa::kAvx512Bf16;
  SYNERGEN_BF16_KERNELS(SYNERGEN_IF)
  SYNERGEN_ENGINE_KERNELS(SYNERGEN_IF)
#undef SYNERGEN_IF
  return Isa::kAvx512;
}

#if defined(SYNERGEN_HAS_AVX2)
#define SYNERGEN_DEFINE(name, Params) \
  void name(const Params& p) {        \
    switch (current_isa()) {          \
      case Isa::kAvx512Bf16:          \
        return avx512bf16::name(p);   \
      case Isa::kAvx512:              \
        return avx512::name(p);       \
      case Isa::kAvx2:                \
        return avx2::name(p);         \
      case Isa::kBaseline:            \
        return baseline::name(p);     \
    }                                 \
  }
#else
#define SYNERGEN_DEFINE(name, Params) \
  void name(const Params& p) { return baseline::name(p); }
#endif
SYNERGEN_KERNELS(SYNERGEN_DEFINE)
SYNERGEN_ENGINE_KERNELS(SYNERGEN_DEFINE)

}  // namespace synergen::cpu
