// nvcc's side of simt.h. All inline PTX, launches and cooperative groups of the project are here;
// each wrapper is one instruction or one intrinsic, with a twin of the same name in emulator.h.
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "common/types.h"
#include "cuda/launch.cuh"

#define SIMT_FN __device__ __forceinline__
#define SIMT_SHARED(T, name, dims) __shared__ T name dims
#define SIMT_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

namespace synergen::simt {

// ---- Barriers

// Waits for `threads` threads of the block, whole warps, at barrier `id` of 16; __syncthreads is
// barrier 0.
SIMT_FN void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// All threads of a cooperative launch.
SIMT_FN void grid_sync() { cooperative_groups::this_grid().sync(); }

// ---- Words shared by blocks

SIMT_FN uint32_t load_acquire(const uint32_t* p) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}

SIMT_FN void add_release(uint32_t* p, uint32_t value) {
  asm volatile("red.release.gpu.add.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}

SIMT_FN void store_release(uint32_t* p, uint32_t value) {
  asm volatile("st.release.gpu.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}

// Once in every turn of a loop that waits for another block.
SIMT_FN void spin_pause() { __nanosleep(20); }

// ---- 16 bytes at a time

struct alignas(16) Words {
  uint32_t v[4];
};

// From global or shared memory.
SIMT_FN Words load16(const void* p) {
  const uint4 w = *static_cast<const uint4*>(p);
  return {{w.x, w.y, w.z, w.w}};
}

// From global memory that nobody writes while the kernel runs and that is read once: past the first
// cache, 128 bytes to the second.
SIMT_FN Words load16_once(const void* p) {
  Words w;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(w.v[0]), "=r"(w.v[1]), "=r"(w.v[2]), "=r"(w.v[3])
               : "l"(p));
  return w;
}

// ---- Asynchronous copies

SIMT_FN uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes; zeros where not `valid`, and then `global` is not read.
SIMT_FN void cp_async16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}

SIMT_FN void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most N of this thread's groups are under way.
template <int N>
SIMT_FN void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- Tensor cores

// Four 8x8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
SIMT_FN void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

SIMT_FN void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d[16, 8] += a[16, 16] b[16, 8], sums in float.
SIMT_FN void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

SIMT_FN void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// (a & b) | c, which the compiler splits in two where b and c are constants.
SIMT_FN uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// Two sums of 16-bit floats, each rounded once. (The multiplication by one is for sm_80, which has
// no addition of bf16.)
SIMT_FN uint32_t add_bf16x2(uint32_t a, uint32_t b) {
  uint32_t sum;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(0x3F803F80u), "r"(b));
  return sum;
}
SIMT_FN uint32_t add_f16x2(uint32_t a, uint32_t b) {
  uint32_t sum;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
  return sum;
}

// ---- Arithmetic that trades exactness for speed

SIMT_FN float fast_exp(float x) { return __expf(x); }
SIMT_FN float fast_log(float x) { return __logf(x); }
SIMT_FN float fast_divide(float a, float b) { return __fdividef(a, b); }
SIMT_FN float reciprocal_sqrt(float x) { return rsqrtf(x); }
SIMT_FN double reciprocal_sqrt(double x) { return rsqrt(x); }

// ---- Storage types to arithmetic and back, to nearest even

SIMT_FN float widen(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
SIMT_FN float widen(f16 x) { return __half2float(__ushort_as_half(x.bits)); }
SIMT_FN float widen(float x) { return x; }
SIMT_FN double widen(double x) { return x; }

template <class T, class A>
SIMT_FN T narrow(A x) {
  if constexpr (std::is_same_v<T, bf16>) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(static_cast<float>(x)))};
  } else if constexpr (std::is_same_v<T, f16>) {
    return {__half_as_ushort(__float2half_rn(static_cast<float>(x)))};
  } else {
    return static_cast<T>(x);
  }
}

// ---- Launches

// More dynamic shared memory than a kernel gets unasked must be asked for.
template <class P>
void allow_shared(const char* op, void (*kernel)(P), size_t bytes) {
  constexpr size_t kUnasked = 48 << 10;
  if (bytes <= kUnasked) return;
  cuda::check(
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                           cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
      op);
}

template <class P>
void launch(const char* op, void (*kernel)(P), dim3 grid, dim3 block, size_t dynamic_shared_bytes,
            void* stream, const P& params) {
  allow_shared(op, kernel, dynamic_shared_bytes);
  kernel<<<grid, block, dynamic_shared_bytes, static_cast<cudaStream_t>(stream)>>>(params);
  cuda::check_launch(op);
}

// How many blocks of a kernel the GPU holds at once: as many as a cooperative launch may have.
template <class P>
int64_t resident_blocks(const char* op, void (*kernel)(P), dim3 block,
                        size_t dynamic_shared_bytes) {
  allow_shared(op, kernel, dynamic_shared_bytes);
  int device = 0, each = 0, multiprocessors = 0;
  cuda::check(cudaGetDevice(&device), op);
  cuda::check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), op);
  cuda::check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
                  &each, reinterpret_cast<const void*>(kernel),
                  static_cast<int>(block.x * block.y * block.z), dynamic_shared_bytes),
              op);
  return int64_t{each} * multiprocessors;
}

// Bytes of shared memory that a block may ask for.
inline int64_t most_shared(const char* op) {
  int device = 0, bytes = 0;
  cuda::check(cudaGetDevice(&device), op);
  cuda::check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), op);
  return bytes;
}

// All blocks are resident at once, so that grid_sync works; CUDA refuses a grid too large for that.
template <class P>
void launch_cooperative(const char* op, void (*kernel)(P), dim3 grid, dim3 block,
                        size_t dynamic_shared_bytes, void* stream, const P& params) {
  allow_shared(op, kernel, dynamic_shared_bytes);
  P copy = params;
  void* arguments[] = {&copy};
  cuda::check(
      cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), grid, block, arguments,
                                  dynamic_shared_bytes, static_cast<cudaStream_t>(stream)),
      op);
}

}  // namespace synergen::simt
