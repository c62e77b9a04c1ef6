// The module synergen_ext._C: torch ops (schema and registration), the same kernels over plain
// arrays, build facts.
#include <pybind11/stl.h>

#include "bind/array_ops.h"
#include "bind/engine.h"
#include "bind/torch_op.h"
#include "cpu/dispatch.h"
#include "cuda/device.h"

using namespace synergen;
namespace py = pybind11;

#ifdef SYNERGEN_WITH_CUDA
constexpr bool kWithCuda = true;
#else
constexpr bool kWithCuda = false;
#endif

STABLE_TORCH_LIBRARY(synergen, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps=1e-5) -> Tensor");
  m.def("rms_norm_backward(Tensor dy, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def(
      "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps=1e-5) -> (Tensor, Tensor)");
  m.def(
      "add_rms_norm_backward(Tensor dy, Tensor dsum, Tensor sum, Tensor weight, float eps) -> "
      "(Tensor, Tensor)");
  m.def(
      "rope(Tensor q, Tensor k, Tensor positions, float theta=1e6, bool inverse=False) -> (Tensor, "
      "Tensor)");
  m.def("fold_tokens(Tensor ids, Tensor table, Tensor pos, int m, int n) -> Tensor");
  m.def(
      "fold_tokens_backward(Tensor dy, Tensor ids, SymInt vocab, int m, int n) -> (Tensor, "
      "Tensor)");
  m.def("fold_ids(Tensor ids, int m, int n) -> Tensor");
  m.def("unfold_ids(Tensor ids, SymInt h, SymInt w, int m, int n) -> Tensor");
  m.def("route_tokens(Tensor expert_index, SymInt experts) -> (Tensor order, Tensor offsets)");
  m.def(
      "expert_ffn(Tensor x, Tensor gate, Tensor up, Tensor down, Tensor expert_index, "
      "Tensor? expert_weight, Tensor? order=None, Tensor? offsets=None) -> Tensor");
  m.def(
      "expert_ffn_train(Tensor x, Tensor gate, Tensor up, Tensor down, Tensor expert_index, "
      "Tensor? expert_weight, Tensor? order=None, Tensor? offsets=None) -> (Tensor, Tensor, "
      "Tensor)");
  m.def(
      "expert_ffn_backward(Tensor dy, Tensor x, Tensor gate, Tensor up, Tensor down, "
      "Tensor expert_index, Tensor? expert_weight, Tensor? gate_pre, Tensor? up_pre, bool need_x, "
      "bool need_experts, bool need_weight, Tensor? order=None, Tensor? offsets=None) -> (Tensor, "
      "Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "expert_ffn_quantized(Tensor x, Tensor gate, Tensor up, Tensor down, Tensor gate_scale, "
      "Tensor up_scale, Tensor down_scale, Tensor expert_index, Tensor? expert_weight) -> Tensor");
  m.def(
      "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, "
      "Tensor? starts=None, float? scale=None) -> Tensor");
  m.def(
      "linear_cross_entropy(Tensor x, Tensor weight, Tensor targets, int ignore_index=-100) -> "
      "(Tensor loss, Tensor lse)");
  m.def(
      "linear_cross_entropy_backward(Tensor dloss, Tensor x, Tensor weight, Tensor targets, "
      "Tensor lse, int ignore_index, bool need_x, bool need_weight) -> (Tensor, Tensor)");
  m.def(
      "sample_tokens(Tensor logits, Tensor seed, Tensor position, Tensor? uncond_logits=None, "
      "Tensor? guidance=None, Tensor? temperature=None, Tensor? top_k=None, Tensor? top_p=None) "
      "-> (Tensor, Tensor)");
  m.def(
      "unfold_head(Tensor states, Tensor tokens, Tensor positions, Tensor[] layers, "
      "Tensor[] biases, Tensor norm, Tensor classifier, Tensor seed, Tensor position, "
      "Tensor? guidance=None, Tensor? temperature=None, Tensor? top_k=None, Tensor? top_p=None, "
      "float eps=1e-5, float theta=1e6, int heads=1, int kv_heads=1, bool persistent=False) "
      "-> (Tensor, Tensor)");
}

// Host functions choose the device themselves: one list for both.
#define SYNERGEN_OPS(X)            \
  X(rms_norm)                      \
  X(rms_norm_backward)             \
  X(add_rms_norm)                  \
  X(add_rms_norm_backward)         \
  X(rope)                          \
  X(fold_tokens)                   \
  X(fold_tokens_backward)          \
  X(fold_ids)                      \
  X(unfold_ids)                    \
  X(route_tokens)                  \
  X(expert_ffn)                    \
  X(expert_ffn_train)              \
  X(expert_ffn_backward)           \
  X(expert_ffn_quantized)          \
  X(decode_attention)              \
  X(linear_cross_entropy)          \
  X(linear_cross_entropy_backward) \
  X(sample_tokens)                 \
  X(unfold_head)
#define SYNERGEN_IMPLEMENT(op) m.impl(#op, SYNERGEN_TORCH_OP(op));

STABLE_TORCH_LIBRARY_IMPL(synergen, CPU, m){SYNERGEN_OPS(SYNERGEN_IMPLEMENT)}
// In a build without CUDA kernels ops run their reference on CUDA tensors:
// synergen_ext/ops/_backend.py registers it.
#ifdef SYNERGEN_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(synergen, CUDA, m){SYNERGEN_OPS(SYNERGEN_IMPLEMENT)}
#endif

PYBIND11_MODULE(_C, m) {
  py::module_ kernels = m.def_submodule("kernels");
  bind::define_array_ops(kernels);
  py::module_ engine = m.def_submodule("engine");
  bind::define_engine(engine);

  m.def("build_info", [] {
    py::dict info;
    info["version"] = SYNERGEN_VERSION;
    info["compiler"] = SYNERGEN_COMPILER;
    info["torch_built"] = SYNERGEN_TORCH_BUILT;
    info["torch_target"] = SYNERGEN_TORCH_TARGET;
    info["cpu_isas"] = cpu::compiled_isas();
    info["cuda"] = kWithCuda;
    info["nvcc"] = SYNERGEN_NVCC;
    info["cuda_archs"] = SYNERGEN_ARCHS;
    return info;
  });
  m.def("cuda_devices", [] {
#ifdef SYNERGEN_WITH_CUDA
    return cuda::device_names();
#else
    return std::vector<std::string>();
#endif
  });
  m.def("cuda_kernels", [] {
    std::vector<std::string> names;
#define SYNERGEN_NAME(name, Params) \
  if (kWithCuda) names.push_back(#name);
    SYNERGEN_KERNELS(SYNERGEN_NAME)
#undef SYNERGEN_NAME
    return names;
  });
  m.def("available_isas", &cpu::available_isas);
  m.def("compiled_isas", &cpu::compiled_isas);
  m.def("current_isa", [] { return cpu::name_of(cpu::current_isa()); });
  m.def("kernel_isa", [](const std::string& kernel) { return cpu::name_of(cpu::isa_of(kernel)); });
}
