#include "cuda/device.h"
#include "cuda/launch.cuh"

namespace synergen::cuda {

DeviceScope::DeviceScope(const char* op, int index) {
  check(cudaGetDevice(&before_), op);
  check(cudaSetDevice(index), op);
}

DeviceScope::~DeviceScope() { cudaSetDevice(before_); }

void* allocate(const char* op, int64_t bytes, void* stream) {
  void* memory = nullptr;
  const auto size = static_cast<size_t>(bytes > 0 ? bytes : 1);
  check(cudaMallocAsync(&memory, size, static_cast<cudaStream_t>(stream)), op);
  return memory;
}

void release(void* memory, void* stream) {
  cudaFreeAsync(memory, static_cast<cudaStream_t>(stream));
}

std::vector<std::string> device_names() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();  // no driver or no GPU is an answer here, not an error to leave behind
    return {};
  }
  std::vector<std::string> names;
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp prop;
    check(cudaGetDeviceProperties(&prop, i), "device_names");
    names.push_back(std::string(prop.name) + ", sm_" + std::to_string(prop.major) +
                    std::to_string(prop.minor));
  }
  return names;
}

}  // namespace synergen::cuda
