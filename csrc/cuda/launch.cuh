// What every launcher needs: a check of the launch with CUDA's own words.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace synergen::cuda {

inline void check(cudaError_t status, const char* op) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(op) + ": CUDA error: " + cudaGetErrorString(status));
  }
}

inline void check_launch(const char* op) { check(cudaGetLastError(), op); }

}  // namespace synergen::cuda
