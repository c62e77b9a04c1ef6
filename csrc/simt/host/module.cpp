// The module synergen_simt: every op as a plain function over arrays, checked by the same host code
// as ever, with the CUDA launchers of a library that `use` has loaded. The library is the kernels'
// sources compiled for the emulator: plainly, with the race detector, with sanitizers, or with a
// planted mistake.
#include <dlfcn.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <cstring>
#include <new>

#include "bind/array_ops.h"

namespace py = pybind11;

namespace {

void* library = nullptr;

template <class F>
F* function(const std::string& name) {
  if (!library) throw std::runtime_error("synergen_simt: no kernels loaded; call use(path) first");
  void* found = dlsym(library, ("synergen_" + name).c_str());
  if (!found) throw std::runtime_error("synergen_simt: the loaded kernels have no " + name);
  return reinterpret_cast<F*>(found);
}

void use(const std::string& path) {
  void* opened = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!opened) throw std::runtime_error(std::string("synergen_simt: ") + dlerror());
  library = opened;  // the one before stays open: its source lines may still be asked for
}

}  // namespace

namespace synergen {

namespace cuda {

#define SYNERGEN_FORWARD(name, Params)                                         \
  void name(const Params& p, void*) {                                          \
    if (const char* error = function<const char*(const Params*)>(#name)(&p)) { \
      throw std::runtime_error(error);                                         \
    }                                                                          \
  }
SYNERGEN_KERNELS(SYNERGEN_FORWARD)
#undef SYNERGEN_FORWARD

#define SYNERGEN_SCRATCH(name, Params)                             \
  int64_t scratch_bytes(const Params& p) {                         \
    return function<int64_t(const Params*)>("scratch_" #name)(&p); \
  }
SYNERGEN_CUDA_SCRATCH(SYNERGEN_SCRATCH)
#undef SYNERGEN_SCRATCH

// Memory of its own for each request, filled with NaN, so that sanitizers see its end and nothing
// relies on zeros.
void* allocate(const char*, int64_t bytes, void*) {
  void* memory = nullptr;
  const auto size = static_cast<size_t>(bytes > 0 ? bytes : 1);
  if (posix_memalign(&memory, 256, size)) throw std::bad_alloc();
  return std::memset(memory, 0xff, size);
}
void release(void* memory, void*) { std::free(memory); }

DeviceScope::DeviceScope(const char*, int) {}
DeviceScope::~DeviceScope() = default;

}  // namespace cuda

// Host functions name these; no array here is on a CPU, so none is called.
namespace cpu {
#define SYNERGEN_ABSENT(name, Params) \
  void name(const Params&) { throw std::logic_error(#name ": not part of the emulator"); }
SYNERGEN_KERNELS(SYNERGEN_ABSENT)
#undef SYNERGEN_ABSENT
}  // namespace cpu

}  // namespace synergen

PYBIND11_MODULE(synergen_simt, m) {
  synergen::bind::define_array_ops(m);
  m.def("use", &use, py::arg("path"));
  m.def(
      "schedule",
      [](int policy, uint64_t seed, int resident_blocks) {
        function<void(int, uint64_t, int)>("schedule")(policy, seed, resident_blocks);
      },
      py::arg("policy") = 0, py::arg("seed") = 0, py::arg("resident_blocks") = 1,
      "0: first in, first out; 1: last in, first out; 2: random, skewed");
  m.def("cuda_kernels", [] {
    std::vector<std::string> names;
#define SYNERGEN_NAME(name, Params) names.push_back(#name);
    SYNERGEN_KERNELS(SYNERGEN_NAME)
#undef SYNERGEN_NAME
    return names;
  });
}
