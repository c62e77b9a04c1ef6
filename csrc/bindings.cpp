// The module synergen_ext._C: torch ops (schema and registration), the same kernels over plain arrays, build facts.
#include <pybind11/stl.h>

#include "bind/array_op.h"
#include "bind/torch_op.h"
#include "cpu/dispatch.h"

using namespace synergen;
namespace py = pybind11;
using py::arg;

STABLE_TORCH_LIBRARY(synergen, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps=1e-5) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(synergen, CPU, m) {
  m.impl("rms_norm", SYNERGEN_TORCH_OP(rms_norm));
}

PYBIND11_MODULE(_C, m) {
  py::module_ kernels = m.def_submodule("kernels");
  SYNERGEN_ARRAY_OP(kernels, rms_norm, arg("x"), arg("weight"), arg("eps") = 1e-5);

  m.def("build_info", [] {
    py::dict info;
    info["version"] = SYNERGEN_VERSION;
    info["compiler"] = SYNERGEN_COMPILER;
    info["torch_built"] = SYNERGEN_TORCH_BUILT;
    info["torch_target"] = SYNERGEN_TORCH_TARGET;
    info["cpu_isas"] = cpu::compiled_isas();
#ifdef SYNERGEN_WITH_CUDA
    info["cuda"] = true;
#else
    info["cuda"] = false;
#endif
    info["nvcc"] = SYNERGEN_NVCC;
    info["cuda_archs"] = SYNERGEN_ARCHS;
    return info;
  });
  m.def("available_isas", &cpu::available_isas);
  m.def("current_isa", [] { return cpu::name_of(cpu::current_isa()); });
}
