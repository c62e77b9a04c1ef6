// What the host needs to know of GPUs, free of CUDA headers so that every build can include it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace synergen::cuda {

// Makes a device current for the calling thread, and the one before it again at the end of the
// scope.
class DeviceScope {
 public:
  DeviceScope(const char* op, int index);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  int before_ = 0;
};

// Device memory in the order of a stream: given once the work before on it is done, taken back once
// the work queued until then is.
void* allocate(const char* op, int64_t bytes, void* stream);
void release(void* memory, void* stream);

// "NVIDIA H100 80GB HBM3, sm_90", one per GPU; empty where there is no GPU or no driver.
std::vector<std::string> device_names();

}  // namespace synergen::cuda
