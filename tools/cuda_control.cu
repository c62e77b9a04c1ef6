// Kernels with one mistake each: what compute-sanitizer must report, or its silence says nothing.
//   nvcc -o control tools/cuda_control.cu && compute-sanitizer --tool racecheck ./control racecheck
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>
#include <utility>

namespace {

// One element past the end.
__global__ void memcheck(int* x, int n) { x[threadIdx.x + 1] = n; }

// Neighbours are read without a barrier.
__global__ void racecheck(int* x, int n) {
  __shared__ int shared[64];
  shared[threadIdx.x] = x[threadIdx.x];
  x[threadIdx.x] = shared[(threadIdx.x + 33) % n];
}

// Half of a warp comes to a barrier of the whole block.
__global__ void synccheck(int* x, int n) {
  if (threadIdx.x < n / 2 - 8) __syncthreads();
  x[threadIdx.x] = n;
}

// Memory that nobody has written.
__global__ void initcheck(int* x, int n) { x[threadIdx.x] += n; }

}  // namespace

int main(int count, char** arguments) {
  constexpr int kThreads = 64;
  if (count != 2) return 2;
  int* x = nullptr;
  if (cudaMalloc(&x, kThreads * sizeof(int)) != cudaSuccess) {
    std::fprintf(stderr, "cuda_control: needs an NVIDIA GPU\n");
    return 2;
  }
  const char* tool = arguments[1];
  if (std::strcmp(tool, "initcheck") != 0) cudaMemset(x, 0, kThreads * sizeof(int));
  for (const auto& [name, kernel] :
       {std::pair{"memcheck", &memcheck}, std::pair{"racecheck", &racecheck},
        std::pair{"synccheck", &synccheck}, std::pair{"initcheck", &initcheck}}) {
    if (std::strcmp(tool, name) == 0) kernel<<<1, kThreads>>>(x, kThreads);
  }
  cudaDeviceSynchronize();
  cudaFree(x);
  return 0;
}
