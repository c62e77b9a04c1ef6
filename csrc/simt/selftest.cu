// Kernels that show one built-in or wrapper each; python_tests/test_simt.py knows what they must
// give.
#include "simt/selftest.h"

namespace synergen::simt {
namespace {

struct ProbeParams {
  const void* in;
  const void* more;
  void* out;
  int n;      // elements, or a number that the kernel explains
  int width;  // of a shuffle
  unsigned mask;
};

template <class From, class To>
__global__ void convert_kernel(ProbeParams p) {
  for (int i = threadIdx.x; i < p.n; i += blockDim.x) {
    static_cast<To*>(p.out)[i] = narrow<To>(widen(static_cast<const From*>(p.in)[i]));
  }
}

// Each thread writes its coordinates at its place in the launch.
__global__ void coordinates_kernel(ProbeParams p) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  unsigned* out = static_cast<unsigned*>(p.out) + 6 * (block * threads + thread);
  out[0] = blockIdx.x, out[1] = blockIdx.y, out[2] = blockIdx.z;
  out[3] = threadIdx.x, out[4] = threadIdx.y, out[5] = threadIdx.z;
}

// out[0..3][lane]: by index, up, down, xor, each with the lane's operand from `more`.
template <class T>
__global__ void shuffle_kernel(ProbeParams p) {
  const unsigned lane = threadIdx.x;
  if ((p.mask >> lane & 1) == 0) return;
  const T value = static_cast<const T*>(p.in)[lane];
  const int operand = static_cast<const int*>(p.more)[lane];
  T* out = static_cast<T*>(p.out) + lane;
  out[0] = __shfl_sync(p.mask, value, operand, p.width);
  out[32] = __shfl_up_sync(p.mask, value, p.n, p.width);
  out[64] = __shfl_down_sync(p.mask, value, p.n, p.width);
  out[96] = __shfl_xor_sync(p.mask, value, p.n, p.width);
}

__global__ void vote_kernel(ProbeParams p) {
  const unsigned lane = threadIdx.x;
  if ((p.mask >> lane & 1) == 0) return;
  const unsigned value = static_cast<const unsigned*>(p.in)[lane];
  unsigned* out = static_cast<unsigned*>(p.out) + lane;
  out[0] = __ballot_sync(p.mask, value % 2 == 0);
  out[32] = static_cast<unsigned>(__any_sync(p.mask, value % 2 == 0));
  out[64] = static_cast<unsigned>(__all_sync(p.mask, value % 2 == 0));
  out[96] = __match_any_sync(p.mask, value);
  out[128] = __reduce_add_sync(p.mask, value);
  out[160] = __reduce_max_sync(p.mask, value);
}

// `n` threads have a true predicate. out[block vote][thread]
__global__ void block_vote_kernel(ProbeParams p) {
  const int mine = static_cast<int>(threadIdx.x) < p.n;
  int* out = static_cast<int*>(p.out) + threadIdx.x;
  out[0] = __syncthreads_or(mine);
  out[blockDim.x] = __syncthreads_and(mine);
  out[2 * blockDim.x] = __syncthreads_count(mine);
}

__global__ void bits_kernel(ProbeParams p) {
  const int i = threadIdx.x;
  const unsigned long long a = static_cast<const unsigned long long*>(p.in)[i];
  const unsigned long long b = static_cast<const unsigned long long*>(p.more)[i];
  const unsigned low = static_cast<unsigned>(a);
  unsigned long long* out = static_cast<unsigned long long*>(p.out) + 8 * i;
  out[0] = __popc(low);
  out[1] = __popcll(a);
  out[2] = __clz(static_cast<int>(low));
  out[3] = __clzll(static_cast<long long>(a));
  out[4] = __brev(low);
  out[5] = __ffs(static_cast<int>(low));
  out[6] = __umulhi(low, static_cast<unsigned>(b));
  out[7] = __umul64hi(a, b);
}

// Each thread reads 16 bytes of `in`, twice, and one word of `more`.
__global__ void words_kernel(ProbeParams p) {
  const int i = threadIdx.x;
  const Words a = load16(static_cast<const char*>(p.in) + 16 * i);
  const Words again = load16_once(static_cast<const char*>(p.in) + 16 * i);
  const uint32_t which = static_cast<const uint32_t*>(p.more)[i];
  uint32_t* out = static_cast<uint32_t*>(p.out) + 8 * i;
  for (int j = 0; j < 4; ++j) out[j] = a.v[j] ^ again.v[3 - j];
  out[4] = add_bf16x2(a.v[0], a.v[1]);
  out[5] = add_f16x2(a.v[2], a.v[3]);
  out[6] = and_or(a.v[0], a.v[1], a.v[2]);
  out[7] = __byte_perm(a.v[0], a.v[1], which);
}

// Every thread of the grid updates the same words.
__global__ void atomic_kernel(ProbeParams p) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const int value = static_cast<const int*>(p.in)[i];
  int* out = static_cast<int*>(p.out);
  atomicAdd(out, value);
  atomicMax(out + 1, value);
  atomicMin(out + 2, value);
  atomicOr(out + 3, value);
  atomicAnd(out + 4, value);
  atomicAdd(reinterpret_cast<float*>(out + 5), static_cast<float>(value));
  atomicMax(static_cast<unsigned long long*>(const_cast<void*>(p.more)),
            static_cast<unsigned long long>(static_cast<unsigned>(value)) << 32 | 7u);
  while (atomicCAS(out + 6, 0, 1) != 0) spin_pause();  // a lock
  __threadfence();
  out[7] += value;
  __threadfence();
  atomicExch(out + 6, 0);
}

template <bool kHalf>
__global__ void mma_kernel(ProbeParams p) {
  const int lane = threadIdx.x;
  const uint32_t* in = static_cast<const uint32_t*>(p.in) + 4 * lane;
  const uint32_t* b = static_cast<const uint32_t*>(p.more) + 2 * lane;
  float* out = static_cast<float*>(p.out) + 4 * lane;
  const uint32_t a[4] = {in[0], in[1], in[2], in[3]};
  float d[4] = {out[0], out[1], out[2], out[3]};
  if constexpr (kHalf) {
    mma_f16(d, a, b[0], b[1]);
  } else {
    mma_bf16(d, a, b[0], b[1]);
  }
  for (int i = 0; i < 4; ++i) out[i] = d[i];
}

// 32 rows of 16 bytes; lane i gives row more[i].
template <bool kTransposed>
__global__ void ldmatrix_kernel(ProbeParams p) {
  SIMT_DYNAMIC_SHARED(shared);
  uint16_t* rows = reinterpret_cast<uint16_t*>(shared);
  const int lane = threadIdx.x;
  for (int i = lane; i < 32 * 8; i += 32) rows[i] = static_cast<const uint16_t*>(p.in)[i];
  __syncwarp();
  const uint16_t* row = rows + static_cast<const int*>(p.more)[lane] * 8;
  uint32_t r[4];
  if constexpr (kTransposed) {
    ldmatrix_x4_trans(r, row);
  } else {
    ldmatrix_x4(r, row);
  }
  for (int i = 0; i < 4; ++i) static_cast<uint32_t*>(p.out)[4 * lane + i] = r[i];
}

// Rows of 64 bytes: 16-byte chunk c of row r lies at chunk c, or at c ^ (r / 2 % 4) where `n`.
__global__ void swizzle_kernel(ProbeParams p) {
  SIMT_DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x;
  for (int i = lane; i < 16 * 32; i += 32) reinterpret_cast<uint16_t*>(shared)[i] = 0;
  __syncwarp();
  const int row = lane % 16, chunk = lane / 16;
  uint32_t r[4];
  ldmatrix_x4(r, shared + row * 64 + (p.n ? chunk ^ (row / 2 % 4) : chunk) * 16);
  static_cast<uint32_t*>(p.out)[lane] = r[0];
}

// The first `n` threads copy 16 bytes, the others zeros: from null, which is not read.
__global__ void zero_fill_kernel(ProbeParams p) {
  SIMT_DYNAMIC_SHARED(shared);
  const int i = threadIdx.x;
  const bool valid = i < p.n;
  cp_async16(shared + 16 * i, valid ? static_cast<const char*>(p.in) + 16 * i : nullptr, valid);
  cp_async_commit();
  cp_async_wait<0>();
  for (int b = 0; b < 16; ++b) static_cast<unsigned char*>(p.out)[16 * i + b] = shared[16 * i + b];
}

// A copy that has landed shows what was in memory; one that has not, the old contents.
__global__ void landing_kernel(ProbeParams p) {
  SIMT_DYNAMIC_SHARED(shared);
  unsigned* word = reinterpret_cast<unsigned*>(shared);
  word[0] = 1;
  cp_async16(shared, p.in, true);
  cp_async_commit();
  static_cast<unsigned*>(p.out)[0] = word[0];
  cp_async_wait<0>();
  static_cast<unsigned*>(p.out)[1] = word[0];
}

// A block of two halves, each with a barrier of its own.
__global__ void named_barrier_kernel(ProbeParams p) {
  SIMT_SHARED(int, words, [2][64]);
  const int half = threadIdx.x / 64, i = threadIdx.x % 64;
  for (int round = 0; round < p.n * (half + 1); ++round) {
    words[half][i] = round + i;
    named_barrier(1 + half, 64);
    static_cast<int*>(p.out)[threadIdx.x] = words[half][63 - i];
    named_barrier(1 + half, 64);
  }
}

struct Probe {
  const char* name;
  void (*kernel)(ProbeParams);
  size_t shared;
};

const Probe kProbes[] = {
    {"f16_to_f32", convert_kernel<f16, float>, 0},
    {"bf16_to_f32", convert_kernel<bf16, float>, 0},
    {"f32_to_f16", convert_kernel<float, f16>, 0},
    {"f32_to_bf16", convert_kernel<float, bf16>, 0},
    {"f64_to_f32", convert_kernel<double, float>, 0},
    {"f64_to_f64", convert_kernel<double, double>, 0},
    {"coordinates", coordinates_kernel, 0},
    {"shuffle32", shuffle_kernel<float>, 0},
    {"shuffle64", shuffle_kernel<unsigned long long>, 0},
    {"vote", vote_kernel, 0},
    {"block_vote", block_vote_kernel, 0},
    {"bits", bits_kernel, 0},
    {"words", words_kernel, 0},
    {"atomic", atomic_kernel, 0},
    {"mma_bf16", mma_kernel<false>, 0},
    {"mma_f16", mma_kernel<true>, 0},
    {"ldmatrix", ldmatrix_kernel<false>, 512},
    {"ldmatrix_trans", ldmatrix_kernel<true>, 512},
    {"swizzle", swizzle_kernel, 1024},
    {"zero_fill", zero_fill_kernel, 512},
    {"landing", landing_kernel, 16},
    {"named_barrier", named_barrier_kernel, 0},
};

}  // namespace
}  // namespace synergen::simt

// grid and block: 3 sizes each.
SIMT_EXPORT const char* simt_probe(const char* name, const unsigned* grid, const unsigned* block,
                                   const synergen::simt::ProbeParams* params) {
  using namespace synergen::simt;
  return error_of([&] {
    for (const Probe& probe : kProbes) {
      if (std::string(name) != probe.name) continue;
      return launch(name, probe.kernel, dim3(grid[0], grid[1], grid[2]),
                    dim3(block[0], block[1], block[2]), probe.shared, nullptr, *params);
    }
    throw std::invalid_argument(std::string("no probe ") + name);
  });
}
