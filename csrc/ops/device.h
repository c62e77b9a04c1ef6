// Sends a kernel to the device of its call, or says in one line why it cannot go there.
#pragma once

#include "common/check.h"
#include "common/tensor.h"
#include "kernels.h"

namespace synergen {

#ifdef SYNERGEN_WITH_CUDA
template <class P>
void launch_on_cuda(void (*kernel)(const P&, void*), P& p, Call& call) {
  if constexpr (requires { p.scratch; }) p.scratch = call.scratch(cuda::scratch_bytes(p));
  kernel(p, call.stream);
}
#define SYNERGEN_LAUNCH(kernel, p, call)         \
  do {                                           \
    if ((call).device.cuda) {                    \
      launch_on_cuda(cuda::kernel, (p), (call)); \
    } else {                                     \
      cpu::kernel(p);                            \
    }                                            \
  } while (false)
#else
#define SYNERGEN_LAUNCH(kernel, p, call)                                                          \
  do {                                                                                            \
    if ((call).device.cuda) {                                                                     \
      refuse(                                                                                     \
          #kernel                                                                                 \
          ": this build has no CUDA kernels; rebuild with nvcc on PATH and SYNERGEN_CUDA=on, or " \
          "use synergen_ext.ops.backend('reference')");                                           \
    }                                                                                             \
    cpu::kernel(p);                                                                               \
  } while (false)
#endif

}  // namespace synergen
