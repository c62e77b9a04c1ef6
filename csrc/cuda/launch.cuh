// What every launcher needs: a check of the launch that says what CUDA says, and what to do where
// that is known.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace synergen::cuda {

inline void check(cudaError_t status, const char* op) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // the error is reported here, so it must not surface again in a later call
  std::string text = std::string(op) + ": CUDA says: " + cudaGetErrorString(status);
  if (status == cudaErrorNoDevice || status == cudaErrorInsufficientDriver) {
    text += "; use CPU arrays, or a machine with an NVIDIA GPU and its driver";
  } else if (status == cudaErrorNoKernelImageForDevice) {
    text += "; rebuild with this GPU's architecture in SYNERGEN_CUDA_ARCHS";
  }
  throw std::runtime_error(text);
}

inline void check_launch(const char* op) { check(cudaGetLastError(), op); }

}  // namespace synergen::cuda
