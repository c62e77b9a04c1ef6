// The launchers of a library of kernels compiled for the emulator, found by name with dlsym. What
// they throw is handed over as text, so that such libraries can come and go.
#include <exception>
#include <string>

#include "kernels.h"
#include "simt/simt.h"

namespace {

thread_local std::string error;

template <class F>
const char* text_of_error(F&& f) {
  try {
    f();
    return nullptr;
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
}

}  // namespace

#define SYNERGEN_EXPORT extern "C" __attribute__((visibility("default")))

#define SYNERGEN_LAUNCHER(name, Params)                                    \
  SYNERGEN_EXPORT const char* synergen_##name(const synergen::Params* p) { \
    return text_of_error([&] { synergen::cuda::name(*p, nullptr); });      \
  }
SYNERGEN_KERNELS(SYNERGEN_LAUNCHER)

#define SYNERGEN_SCRATCH(name, Params)                                         \
  SYNERGEN_EXPORT int64_t synergen_scratch_##name(const synergen::Params* p) { \
    return synergen::cuda::scratch_bytes(*p);                                  \
  }
SYNERGEN_CUDA_SCRATCH(SYNERGEN_SCRATCH)

SYNERGEN_EXPORT void synergen_schedule(int policy, uint64_t seed, int resident_blocks) {
  synergen::simt::set_options({policy, seed, resident_blocks});
}
