// The one header of kernel sources. nvcc reads them as CUDA; any other C++ compiler reads them as
// plain C++ for the emulator, which runs a grid on the CPU and checks what it does.
//
// Kernels take one parameter struct by value, declare shared memory with SIMT_SHARED and
// SIMT_DYNAMIC_SHARED alone, name warp masks in full, and reach barriers together.
#pragma once

#ifdef __CUDACC__
#include "simt/device.cuh"
#else
#include "simt/emulator.h"
#endif
