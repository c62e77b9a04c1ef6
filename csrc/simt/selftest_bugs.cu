// Kernels with planted bugs: each does its work rightly where `bug` is kNone, and otherwise makes
// that one mistake. The lines that reports must name carry a tag after an @.
#include "simt/selftest.h"

namespace synergen::simt {
namespace {

enum Bug {
  kNone,
  kNoSyncAfterPartials,
  kNoSyncBeforeReuse,
  kNoSyncwarp,
  kStaticOutOfRange,
  kNotWritten,
  kDynamicWriteOutOfRange,
  kDynamicReadOutOfRange,
  kPastTheRow,
  kDivergentShuffle,
  kWrongMask,
  kAbsentLane,
  kLaneOutsideMask,
  kExitedLane,
  kAwaitedExit,
  kMixedOperations,
  kBadWidth,
  kDivergentBarrier,
  kEarlyExit,
  kLateExit,
  kDeadlock,
  kCountMismatch,
  kPartOfWarp,
  kNoWait,
  kWeakWait,
  kNoSyncAfterWait,
  kStageOverwritten,
  kMisalignedCopy,
  kCopyOutOfRange,
  kNotCommitted,
  kExitInFlight,
  kMisalignedMatrix,
  kMatrixOutOfRange,
  kLostUpdate,
  kPlainReadOfAtomic,
  kMisalignedAtomic,
  kNoGridBarrier,
  kNoLeadingSync,
  kNoTrailingSync,
  kRelaxedArrival,
  kRelaxedWait,
  kNotCooperative,
  kBlockExitsEarly,
  kLivelock,
  kNoFenceBeforeFlag,
};

struct PlantedParams {
  const float* x;
  float* y;
  uint32_t* words;
  int n;  // rounds
  int bug;
};

constexpr unsigned kAll = 0xFFFFFFFFu;
constexpr int kThreads = 128;

// y[block, round] = sum of x[block, round, thread].
__global__ void __launch_bounds__(kThreads) sum_kernel(PlantedParams p) {
  SIMT_SHARED(float, partial, [4]);
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int round = 0; round < p.n; ++round) {
    const unsigned row = blockIdx.x * p.n + round;
    float x = p.x[row * kThreads + threadIdx.x];
    for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(kAll, x, distance);
    if (lane == 0) partial[warp] = x;  // @sum-write
    if (p.bug != kNoSyncAfterPartials) __syncthreads();
    float sum = 0;
    for (int w = 0; w < 4; ++w) sum += partial[w];  // @sum-read
    if (p.bug != kNoSyncBeforeReuse) __syncthreads();
    if (threadIdx.x == 0) p.y[row] = sum;
  }
}

// y[t] = x[t ^ 1] through shared memory, warp by warp.
__global__ void __launch_bounds__(kThreads) exchange_kernel(PlantedParams p) {
  SIMT_SHARED(float, held, [kThreads]);
  const int t = threadIdx.x;
  const int shift = p.bug == kStaticOutOfRange ? 1 : 0;
  const bool writes = p.bug != kNotWritten || t != 5;
  for (int round = 0; round < p.n; ++round) {
    if (writes) held[t + shift] = p.x[t] + round;  // @exchange-write
    if (p.bug != kNoSyncwarp) __syncwarp();
    p.y[t] = held[t ^ 1];  // @exchange-read
    __syncwarp();
  }
}

// y[t] = x[t + 1], the last from the first, through dynamic shared memory.
__global__ void __launch_bounds__(kThreads) rotate_kernel(PlantedParams p) {
  SIMT_DYNAMIC_SHARED(shared);
  float* held = reinterpret_cast<float*>(shared);
  const int t = threadIdx.x, first = blockIdx.x * kThreads;
  held[t] = p.x[first + t];
  if (p.bug == kDynamicWriteOutOfRange && t == 0) held[kThreads] = 1;  // @rotate-past
  __syncthreads();
  const int next = p.bug == kDynamicReadOutOfRange ? t + 1 : (t + 1) % kThreads;
  p.y[first + t] = held[next];                                    // @rotate-read
  if (p.bug == kPastTheRow && t == 0) p.y[first + kThreads] = 0;  // @rotate-next-row
}

// y[t] = x[t ^ 1] by shuffles. With AbsentLane blocks have 48 threads.
__global__ void __launch_bounds__(kThreads) shuffle_kernel(PlantedParams p) {
  const unsigned lane = threadIdx.x % 32;
  float x = p.x[threadIdx.x];
  if (p.bug == kExitedLane && lane == 31) return;
  if (p.bug == kExitedLane) __syncwarp(0x7FFFFFFFu);
  if (p.bug == kAwaitedExit && lane == 0) return;
  if (p.bug != kDivergentShuffle || lane != 3) {
    x = __shfl_xor_sync(kAll, x, 1);  // @shuffle-xor
  }
  if (p.bug == kDivergentShuffle) __syncwarp();                                  // @shuffle-after
  if (p.bug == kWrongMask) x += __shfl_sync(0xFFFEu, x, 1);                      // @shuffle-mask
  if (p.bug == kLaneOutsideMask && lane < 16) x += __shfl_sync(0xFFFFu, x, 20);  // @shuffle-outside
  if (p.bug == kBadWidth) x += __shfl_sync(kAll, x, 0, 24);                      // @shuffle-width
  if (p.bug == kMixedOperations) {
    x += lane == 0 ? __ballot_sync(kAll, 1) : __shfl_sync(kAll, x, 1);  // @shuffle-mixed
  }
  p.y[threadIdx.x] = x;
}

// y[t] = x[127 - t] through shared memory, in a block of 128.
__global__ void __launch_bounds__(kThreads) barrier_kernel(PlantedParams p) {
  SIMT_SHARED(float, held, [kThreads]);
  const int t = threadIdx.x;
  held[t] = p.x[t];
  if (p.bug == kEarlyExit && t == 7) return;
  if (p.bug == kDivergentBarrier && t >= 64) {
    __syncthreads();  // @barrier-other
  } else if (p.bug == kDeadlock && t >= 64) {
    named_barrier(1, 96);  // @barrier-96
  } else if (p.bug == kCountMismatch) {
    named_barrier(1, t < 32 ? 64 : 96);  // @barrier-count
  } else if (p.bug == kPartOfWarp) {
    if (t % 2 == 0) named_barrier(1, 64);  // @barrier-part
  }
  __syncthreads();  // @barrier-first
  p.y[t] = held[kThreads - 1 - t];
  if (p.bug == kLateExit && t == 7) return;
  __syncthreads();  // @barrier-last
}

// y[t] = sum over tiles of 128 x 16 bytes of what thread (t + 32) % 128 copied, in two stages.
__global__ void __launch_bounds__(kThreads) copy_kernel(PlantedParams p) {
  SIMT_DYNAMIC_SHARED(shared);
  constexpr int kStage = kThreads * 16;
  const int t = threadIdx.x, other = (t + 32) % kThreads;
  const auto copy = [&](int tile) {
    int to = tile % 2 * kStage + 16 * t;
    const float* from = p.x + (tile * kThreads + t) * 4;
    if (p.bug == kMisalignedCopy) from += 1;
    if (p.bug == kCopyOutOfRange) to += kStage;
    cp_async16(shared + to, from, true);  // @copy-issue
  };
  float sum = 0;
  copy(0);
  cp_async_commit();
  for (int tile = 0; tile < p.n; ++tile) {
    if (tile + 1 < p.n) copy(tile + 1);
    if (p.bug != kNotCommitted) cp_async_commit();
    if (p.bug == kWeakWait) {
      cp_async_wait<2>();
    } else if (p.bug != kNoWait && p.bug != kExitInFlight) {
      cp_async_wait<1>();
    }
    if (p.bug != kNoSyncAfterWait) __syncthreads();
    const float* held = reinterpret_cast<const float*>(shared + tile % 2 * kStage + 16 * other);
    if (p.bug != kExitInFlight) sum += held[0] + held[3];  // @copy-read
    if (p.bug != kStageOverwritten) __syncthreads();
  }
  if (p.bug != kExitInFlight) cp_async_wait<0>();
  p.y[t] = sum;
}

// words[lane] = a register of the matrices that `shared` holds: row i is 8 times i.
__global__ void __launch_bounds__(32) matrix_kernel(PlantedParams p) {
  SIMT_DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x;
  for (int i = 0; i < 8; ++i) reinterpret_cast<uint16_t*>(shared)[8 * lane + i] = lane;
  __syncwarp();
  int at = 16 * lane;
  if (p.bug == kMisalignedMatrix && lane == 3) at += 4;
  if (p.bug == kMatrixOutOfRange) at += 16;
  uint32_t r[4];
  ldmatrix_x4(r, shared + at);  // @matrix-read
  p.words[lane] = r[0];
}

// words[0] = threads of the grid.
__global__ void __launch_bounds__(kThreads) count_kernel(PlantedParams p) {
  if (p.bug == kLostUpdate) {
    p.words[0] = p.words[0] + 1;  // @count-plain
  } else if (p.bug == kMisalignedAtomic) {
    char* between = reinterpret_cast<char*>(p.words) + 2;
    atomicAdd(reinterpret_cast<uint32_t*>(between), 1u);  // @count-misaligned
  } else {
    atomicAdd(p.words, 1u);  // @count-atomic
  }
  if (p.bug == kPlainReadOfAtomic) {
    p.y[threadIdx.x] = static_cast<float>(p.words[0]);  // @count-read
  }
}

// Of all blocks: `arrived` counts them, round after round.
SIMT_FN void hand_made_barrier(const PlantedParams& p, uint32_t round) {
  uint32_t* arrived = p.words;
  if (p.bug != kNoLeadingSync) __syncthreads();
  if (threadIdx.x == 0) {
    if (p.bug == kRelaxedArrival) {
      atomicAdd(arrived, 1u);
    } else {
      add_release(arrived, 1);
    }
    const uint32_t goal = gridDim.x * (round + 1) + (p.bug == kLivelock ? 1 : 0);
    if (p.bug == kRelaxedWait) {
      while (atomicAdd(arrived, 0u) < goal) spin_pause();
    } else {
      while (load_acquire(arrived) < goal) spin_pause();  // @grid-spin
    }
  }
  if (p.bug != kNoTrailingSync) __syncthreads();
}

// Round by round y[i] = y[i + 1] + x[i], the last from the first, in two halves of y by turns.
template <bool kHandMade>
__global__ void __launch_bounds__(kThreads) grid_kernel(PlantedParams p) {
  const int total = gridDim.x * kThreads;
  const int i = blockIdx.x * kThreads + threadIdx.x;
  for (int round = 0; round < p.n; ++round) {
    const float* from = p.y + round % 2 * total;
    float* to = p.y + (round + 1) % 2 * total;
    const float next = from[(i + 1) % total];  // @grid-read
    to[i] = next + p.x[i];                     // @grid-write
    if (p.bug == kBlockExitsEarly && blockIdx.x == 1) return;
    if (p.bug == kNoGridBarrier) continue;
    if constexpr (kHandMade) {
      hand_made_barrier(p, round);
    } else {
      grid_sync();  // @grid-sync
    }
  }
}

// The first block writes y and raises a flag; the others wait for it and copy y to themselves.
__global__ void __launch_bounds__(32) flag_kernel(PlantedParams p) {
  const int i = threadIdx.x;
  if (blockIdx.x == 0) {
    p.y[i] = p.x[i];  // @flag-write
    __syncwarp();
    if (i == 0) {
      if (p.bug != kNoFenceBeforeFlag) __threadfence();
      atomicExch(p.words, 1u);
    }
  } else {
    if (i == 0) {
      while (load_acquire(p.words) == 0) spin_pause();
    }
    __syncwarp();
    p.y[32 * blockIdx.x + i] = p.y[i];  // @flag-read
  }
}

struct Planted {
  const char* name;
  void (*kernel)(PlantedParams);
  size_t shared;
  bool cooperative;
};

const Planted kPlanted[] = {
    {"sum", sum_kernel, 0, false},
    {"exchange", exchange_kernel, 0, false},
    {"rotate", rotate_kernel, kThreads * 4, false},
    {"shuffle", shuffle_kernel, 0, false},
    {"barrier", barrier_kernel, 0, false},
    {"copy", copy_kernel, 2 * kThreads * 16, false},
    {"matrix", matrix_kernel, 512, false},
    {"count", count_kernel, 0, false},
    {"grid", grid_kernel<false>, 0, true},
    {"hand_made", grid_kernel<true>, 0, true},
    {"flag", flag_kernel, 0, true},
};

}  // namespace
}  // namespace synergen::simt

SIMT_EXPORT const char* simt_planted(const char* name, unsigned blocks, unsigned threads,
                                     const synergen::simt::PlantedParams* params) {
  using namespace synergen::simt;
  return error_of([&] {
    for (const Planted& planted : kPlanted) {
      if (std::string(name) != planted.name) continue;
      const bool cooperative = planted.cooperative && params->bug != kNotCooperative;
      return (cooperative ? launch_cooperative<PlantedParams>
                          : launch<PlantedParams>)(name, planted.kernel, dim3(blocks),
                                                   dim3(threads), planted.shared, nullptr, *params);
    }
    throw std::invalid_argument(std::string("no kernel ") + name);
  });
}
