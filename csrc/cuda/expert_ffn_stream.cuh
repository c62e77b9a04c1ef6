// expert_ffn for few pairs of token and expert: weights stream from memory once, no sort. Up to 8
// pairs go in one launch where expert_ffn_single.cuh takes them; all others in two, which are here.
// A block takes a chunk of at most 16 pairs (32 with 8-bit weights, 8 without tensor cores) and
// those of them that have one expert; further chunks read the weights again, mostly from the second
// cache.
//
//   hidden[pair] = silu(gate[e] x) * (up[e] x)   a warp has 8 columns: 8 rows of gate, 8 of up
//   y[t] = sum_j weight_tj down[e] hidden[pair]  a warp has 16 columns
//
// D = 2048, F = 8192: 1024 and 128 tiles. With 2 and 16 warps to a tile, each with its part of the
// depth, both launches are 128 blocks of 16 warps: one wave on 132 multiprocessors, no tail; and 64
// KB under way on each, 3.5 times what an H100 wants, so 128 draw its whole bandwidth. Two launches
// and their edges are 7 us beside that (2 rows of bfloat16, static bound on an H100).
//
// Every block reads the activations of its part of the depth, from the second cache. Where all
// warps of a block share 16 columns that is rows / 16 of its bytes of weights in bfloat16: little
// up to 8 rows, 4 times as much at 64. So beyond 8 rows a block takes more columns and a part of
// the depth; the parts' sums, float32, are added in order by a third launch, which also adds a
// token's experts.
#pragma once

#include <cmath>

#include "cuda/expert_ffn_single.cuh"
#include "cuda/stream.cuh"
#include "kernels.h"

namespace synergen::cuda::stream {

struct FfnLaunch {
  int64_t tokens, pairs, top_k, experts, columns;
  int k;
  Matrix low, high;  // gate and up, or down and down
  int group_log2;    // as in Operands
  const void* x;     // [tokens, k]; for down [pairs, k]
  int64_t x_strides[2];
  const int64_t* index;  // [tokens, top_k]; a negative one makes NaN
  int64_t index_strides[2];
  const void* weight;  // [tokens, top_k], or null
  bool weight_is_float;
  int64_t weight_strides[2];
  int split;   // warps to a tile
  int slices;  // blocks to a tile
  void* out;   // [pairs, columns] of Out
  void* part;  // [slices, pairs, columns] in float or double; null: to `out`
};

constexpr int kMostPairs = 64;

// Warps of a block: so many that 128 or 255 registers do.
template <class T, class W, int NT, bool kPacked>
constexpr int kWarps = kPacked && kTensor<T, W> && NT <= (kQuantised<W> ? 1 : 2) ? 16 : 8;
template <class T, class W, bool kPacked>
constexpr int kPairs = kPacked ? 8 * kMostTiles<T, W> : 8;  // of a chunk

// The pairs of one expert among a chunk of at most 32.
struct Routed {
  int64_t expert;
  unsigned pairs;   // a bit each; none: the chunk has fewer experts
  unsigned nobody;  // pairs without an expert
};

SIMT_FN int64_t index_of(const FfnLaunch& p, int64_t pair) {
  return p.index[pair / p.top_k * p.index_strides[0] + pair % p.top_k * p.index_strides[1]];
}

// The expert that is number `slot` by first appearance. Every warp finds it for itself: a load,
// which all blocks find in the second cache, and some votes.
SIMT_FN Routed route(const FfnLaunch& p, int64_t first, int chunk_pairs, int slot) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const bool is_pair = lane < chunk_pairs && first + lane < p.pairs;
  int64_t expert = is_pair ? index_of(p, first + lane) : -1;
  if (expert >= p.experts) expert = -1;
  unsigned left = __ballot_sync(kAll, expert >= 0);
  Routed routed{0, 0, __ballot_sync(kAll, is_pair && expert < 0)};
  for (int s = 0; s <= slot; ++s) {
    if (left == 0) return {0, 0, routed.nobody};
    routed.expert = __shfl_sync(kAll, expert, __ffs(static_cast<int>(left)) - 1);
    routed.pairs = __ballot_sync(kAll, expert == routed.expert);
    left &= ~routed.pairs;
  }
  return routed;
}

// The routing weight of a pair, where there are any.
template <class A, class T>
SIMT_FN A weight_of(const FfnLaunch& p, int64_t pair) {
  if (p.weight == nullptr) return 1;
  const int64_t at = pair / p.top_k * p.weight_strides[0] + pair % p.top_k * p.weight_strides[1];
  if (p.weight_is_float) return static_cast<A>(static_cast<const float*>(p.weight)[at]);
  return static_cast<A>(simt::widen(static_cast<const T*>(p.weight)[at]));
}

// T: of x; Out: of `out`, and of the routing weights where they are not float. kDown: the second of
// the two.
template <class T, class W, class Out, int NT, bool kPacked, bool kDown>
__global__ void __launch_bounds__((32 * kWarps<T, W, NT, kPacked>), 1) ffn_kernel(FfnLaunch p) {
  using A = Acc<T>;
  constexpr int kColumns = kDown ? 16 : 8, kBlock = kWarps<T, W, NT, kPacked>;
  constexpr int kChunkPairs = kPairs<T, W, kPacked>;
  SIMT_SHARED(A, sums, [kBlock * NT * 4 * 32]);
  SIMT_SHARED(uint8_t, orders, [kBlock][32]);
  SIMT_SHARED(A, factors, [kDown ? kBlock : 1][32]);
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  const int g = lane / 4, t = lane % 4;
  const int slot = static_cast<int>(blockIdx.y) / p.slices;
  const int slice = static_cast<int>(blockIdx.y) % p.slices;
  // Chunks that read the same weights are neighbours.
  const int64_t chunks = ceil_div(p.pairs, kChunkPairs);
  const int64_t first = blockIdx.x % chunks * kChunkPairs;
  const int64_t tile = blockIdx.x / chunks * (kBlock / p.split) + warp / p.split;
  const int64_t column = tile * kColumns + g;  // and column + 8 where kDown
  uint8_t* order = orders[warp];               // the place in the chunk of each row
  A* factor = factors[kDown ? warp : 0];
  const Routed routed = route(p, first, kChunkPairs, slot);
  const int rows = __popc(routed.pairs);
  if ((routed.pairs >> lane & 1) != 0) {
    const int row = __popc(routed.pairs & ((1u << lane) - 1));
    order[row] = static_cast<uint8_t>(lane);
    if constexpr (kDown) factor[row] = weight_of<A, Out>(p, first + lane);
  }
  __syncwarp();
  A sum[NT][4] = {};
  if (rows > 0 && tile * kColumns < p.columns) {
    Operands<T, W, NT> in{};
    in.k = p.k;
    in.x_step = p.x_strides[1];
    in.w_step[0] = p.low.strides[2];
    in.w_step[1] = p.high.strides[2];
    in.scale_step[0] = p.low.scale_strides[2];
    in.scale_step[1] = p.high.scale_strides[2];
    in.group_log2 = p.group_log2;
#pragma unroll
    for (int i = 0; i < NT; ++i) {
      const int row = min(8 * i + g, rows - 1);
      const int64_t pair = first + order[row];
      in.x[i] = static_cast<const T*>(p.x) + (kDown ? pair : pair / p.top_k) * p.x_strides[0];
    }
    const int64_t last = p.columns - 1;
    point(p.low, routed.expert, min(column, last), in.w[0], in.scale[0]);
    point(p.high, routed.expert, min(column + (kDown ? 8 : 0), last), in.w[1], in.scale[1]);
    const int64_t parts = static_cast<int64_t>(p.slices) * p.split;
    const int64_t part = static_cast<int64_t>(slice) * p.split + warp % p.split;
    multiply<kPacked>(in, part_begin<W>(p.k, part, parts), part_begin<W>(p.k, part + 1, parts),
                      sum);
  }
  join(sum, p.split, sums);
  if (warp % p.split != 0) return;
  if (kDown && slot == 0 && p.part == nullptr) {
    for (int i = 0; i < kChunkPairs; ++i) {
      const int64_t c = tile * kColumns + lane;
      if ((routed.nobody >> i & 1) == 0 || lane >= kColumns || c >= p.columns) continue;
      const bool refused = index_of(p, first + i) < 0;
      static_cast<Out*>(p.out)[(first + i) * p.columns + c] =
          simt::narrow<Out>(A(refused ? NAN : 0));
    }
  }
#pragma unroll
  for (int i = 0; i < NT; ++i) {
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const int row = 8 * i + 2 * t + b;
      if (row >= rows) continue;
      const int64_t pair = first + order[row];
      if constexpr (!kDown) {
        const A gate = sum[i][b], up = sum[i][2 + b];
        if (column < p.columns) {
          static_cast<Out*>(p.out)[pair * p.columns + column] =
              simt::narrow<Out>(gate / (1 + std::exp(-gate)) * up);
        }
      } else {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int64_t c = column + 8 * h;
          if (c >= p.columns) continue;
          const A value = sum[i][2 * h + b] * factor[row];
          if (p.part == nullptr) {
            static_cast<Out*>(p.out)[pair * p.columns + c] = simt::narrow<Out>(value);
          } else {
            static_cast<A*>(p.part)[(slice * p.pairs + pair) * p.columns + c] = value;
          }
        }
      }
    }
  }
}

// y[t] = the sum over j, then over slices, of its parts, where there are any.
template <class Out>
__global__ void __launch_bounds__(256) ffn_sum_kernel(FfnLaunch p) {
  using A = Acc<Out>;
  const int64_t token = blockIdx.x, step = static_cast<int64_t>(gridDim.y) * blockDim.x;
  const int64_t* index = p.index + token * p.index_strides[0];
  for (int64_t c = blockIdx.y * blockDim.x + threadIdx.x; c < p.columns; c += step) {
    A sum = 0;
    for (int64_t j = 0; j < p.top_k; ++j) {
      const int64_t expert = index[j * p.index_strides[1]];
      if (expert < 0) sum += A(NAN);
      if (p.part == nullptr || expert < 0 || expert >= p.experts) continue;
      const A* part = static_cast<const A*>(p.part) + (token * p.top_k + j) * p.columns + c;
      for (int s = 0; s < p.slices; ++s) sum += part[s * p.pairs * p.columns];
    }
    static_cast<Out*>(p.out)[token * p.columns + c] = simt::narrow<Out>(sum);
  }
}

// ---- Launches

// Warps that fill 128 multiprocessors for each tile of columns, as long as each has four chunks.
template <class W>
int warps_to_a_tile(int64_t tiles, int64_t k, int warps) {
  int parts = 1;
  while (parts < warps && tiles * parts < 128 * warps && ceil_div(k, kChunk<W>) >= 8 * parts)
    parts *= 2;
  return parts;
}

// Blocks that share the depth of the second launch; 1: sums go straight to y.
template <class W>
int slices_of(const ExpertFfnParams& p) {
  const int64_t pairs = p.tokens * p.top_k;
  if (pairs <= 8 || pairs > kMostPairs) return 1;
  const int warps = pairs <= 16 ? 16 : 8;
  const int parts = warps_to_a_tile<W>(ceil_div(p.dim, 16), p.hidden, warps);
  return parts > 8 ? 8 : parts;
}

struct Scratch {  // bytes; hidden first, each at 256 bytes
  int64_t hidden, parts;
  int64_t all() const { return hidden + parts; }
};

template <class T, class W>
Scratch scratch_of(const ExpertFfnParams& p) {
  using H = std::conditional_t<kTensor<T, W>, T, Acc<T>>;
  const auto whole = [](int64_t bytes) { return ceil_div(bytes, 256) * 256; };
  const int64_t pairs = p.tokens * p.top_k;
  const int64_t slices = kTensor<T, W> ? slices_of<W>(p) : 1;
  const bool parts = p.top_k > 1 || slices > 1;
  return {whole(pairs * p.hidden * static_cast<int64_t>(sizeof(H))),
          parts ? whole(slices * pairs * p.dim * static_cast<int64_t>(sizeof(Acc<T>))) : 0};
}

template <class T, class W, class Out, bool kDown, int NT, bool kPacked>
void launch_tiles(const char* op, FfnLaunch& p, void* stream) {
  constexpr int kBlock = kWarps<T, W, NT, kPacked>;
  const int64_t tiles = ceil_div(p.columns, kDown ? 16 : 8);
  const int parts = warps_to_a_tile<W>(tiles, p.k, kBlock);
  p.split = parts / p.slices > 1 ? parts / p.slices : 1;
  const int64_t chunks = ceil_div(p.pairs, kPairs<T, W, kPacked>);
  const int64_t most = p.pairs < kPairs<T, W, kPacked> ? p.pairs : kPairs<T, W, kPacked>;
  const int64_t slots = p.experts < most ? p.experts : most;
  dim3 blocks = blocks_for(op, ceil_div(tiles * p.split, kBlock) * chunks, 1);
  blocks.y = static_cast<unsigned>(slots * p.slices);
  simt::launch(op, ffn_kernel<T, W, Out, NT, kPacked, kDown>, blocks, dim3(32 * kBlock), 0, stream,
               p);
}

template <class T, class W, class Out, bool kDown>
void launch_rows(const char* op, FfnLaunch& p, bool packed, void* stream) {
  if constexpr (!kTensor<T, W>) {
    packed ? launch_tiles<T, W, Out, kDown, 1, true>(op, p, stream)
           : launch_tiles<T, W, Out, kDown, 1, false>(op, p, stream);
  } else if (!packed) {
    launch_tiles<T, W, Out, kDown, 1, false>(op, p, stream);
  } else if (p.pairs <= 8) {
    launch_tiles<T, W, Out, kDown, 1, true>(op, p, stream);
  } else if (p.pairs <= 16 || kMostTiles<T, W> == 2) {
    launch_tiles<T, W, Out, kDown, 2, true>(op, p, stream);
  } else if constexpr (kMostTiles<T, W> == 4) {
    launch_tiles<T, W, Out, kDown, 4, true>(op, p, stream);
  }
}

template <class Out>
void launch_sum(const char* op, const FfnLaunch& p, void* stream) {
  dim3 blocks = blocks_for(op, p.tokens, 1);
  blocks.y = static_cast<unsigned>(min(ceil_div(p.columns, 256), int64_t{65535}));
  simt::launch(op, ffn_sum_kernel<Out>, blocks, dim3(256), 0, stream, p);
}

// Whether rows of x and of both matrices are whole accesses of 16 bytes.
template <class T, class W>
bool packs_all(const FfnLaunch& p) {
  bool fits =
      packs<T>(p.x, p.x_strides[1], p.x_strides, 1) && p.k % kPack<T> == 0 && p.k % kEach<W> == 0;
  for (const Matrix* m : {&p.low, &p.high}) {
    fits = fits && packs<W>(m->data, m->strides[2], m->strides, 2) &&
           (!kQuantised<W> || m->scale_strides[2] == 1);
  }
  return fits;
}

// Both products in one launch, expert_ffn_single.cuh, where that takes these sizes. The parts that
// warps have are those of the two launches.
template <class T, class W>
bool launch_single(const char* op, const ExpertFfnParams& p, const FfnLaunch& gate_up,
                   const FfnLaunch& down, void* stream) {
  constexpr int kElements = kRing * kChunk<W>;
  if (p.tokens * p.top_k > kSinglePairs || p.experts > INT32_MAX) return false;
  SingleLaunch q{};
  int most = 0;
  for (int i = 0; i < 2; ++i) {
    const FfnLaunch& from = i == 0 ? gate_up : down;
    const int64_t tiles = from.columns / (i == 0 ? 8 : 16);
    const int split = warps_to_a_tile<W>(tiles, from.k, kSingleWarps);
    if (!packs_all<T, W>(from) || from.k % kElements != 0 || tiles * split % kSingleWarps != 0 ||
        (kQuantised<W> && from.group_log2 < 6)) {
      return false;
    }
    q.product[i] = {from.low,
                    from.high,
                    from.k / kElements,
                    __builtin_ctz(static_cast<unsigned>(split)),
                    static_cast<int>(tiles * split / kSingleWarps),
                    from.group_log2};
    most = q.product[i].rounds > most ? q.product[i].rounds : most;
  }
  q.pairs = static_cast<int>(p.tokens * p.top_k);
  q.top_k = static_cast<int>(p.top_k);
  q.inverse = 65536 / q.top_k + 1;
  q.dim = static_cast<int>(p.dim);
  q.hidden = static_cast<int>(p.hidden);
  q.experts = p.experts;
  q.x = p.x;
  q.x_stride = p.x_strides[0];
  q.index = p.index;
  q.weight = p.weight;
  q.weight_is_float = gate_up.weight_is_float;
  for (int d = 0; d < 2; ++d) {
    q.index_strides[d] = p.index_strides[d];
    q.weight_strides[d] = p.weight_strides[d];
  }
  q.inner = gate_up.out;
  q.y = p.y;
  const auto kernel = ffn_single_kernel<T, W>;
  const dim3 threads(32 * kSingleWarps);
  const int64_t resident = simt::resident_blocks(op, kernel, threads, kSingleRing);
  if (resident < 1) return false;
  const auto blocks = static_cast<unsigned>(resident < most ? resident : most);
  simt::launch_cooperative(op, kernel, dim3(blocks), threads, kSingleRing, stream, q);
  return true;
}

// gate, up and down: their scales, or none. `scratch` holds scratch_of(p).
template <class T, class W>
void launch_ffn(const char* op, const ExpertFfnParams& p, const Matrix& gate, const Matrix& up,
                const Matrix& down, int gate_group_log2, int down_group_log2, void* scratch,
                void* stream) {
  using H = std::conditional_t<kTensor<T, W>, T, Acc<T>>;
  if (p.dim > INT32_MAX / 2 || p.hidden > INT32_MAX / 2) {
    throw std::invalid_argument(std::string(op) + ": rows may have 2^30 elements on CUDA, got " +
                                std::to_string(p.dim > p.hidden ? p.dim : p.hidden));
  }
  FfnLaunch q{};
  q.tokens = p.tokens;
  q.pairs = p.tokens * p.top_k;
  q.top_k = p.top_k;
  q.experts = p.experts;
  q.index = p.index;
  q.weight = p.weight;
  q.weight_is_float = p.weight_dtype == DType::kFloat32;
  q.slices = 1;
  for (int d = 0; d < 2; ++d) {
    q.index_strides[d] = p.index_strides[d];
    q.weight_strides[d] = p.weight_strides[d];
    q.x_strides[d] = p.x_strides[d];
  }
  if (q.pairs == 0 || p.hidden == 0 || p.experts == 0) {
    q.out = p.y;
    q.columns = p.dim;
    return launch_sum<T>(op, q, stream);
  }
  const Scratch bytes = scratch_of<T, W>(p);
  q.low = gate;
  q.high = up;
  q.group_log2 = gate_group_log2;
  q.k = static_cast<int>(p.dim);
  q.columns = p.hidden;
  q.x = p.x;
  q.out = scratch;

  FfnLaunch second = q;
  second.low = second.high = down;
  second.group_log2 = down_group_log2;
  second.k = static_cast<int>(p.hidden);
  second.columns = p.dim;
  second.x = scratch;
  second.x_strides[0] = p.hidden;
  second.x_strides[1] = 1;
  second.out = p.y;
  if (bytes.parts > 0) {
    second.part = static_cast<char*>(scratch) + bytes.hidden;
    if constexpr (kTensor<T, W>) second.slices = slices_of<W>(p);
  }

  if constexpr (kTensor<T, W>) {
    if (launch_single<T, W>(op, p, q, second, stream)) return;
  }
  launch_rows<T, W, H, false>(op, q, packs_all<T, W>(q), stream);
  launch_rows<H, W, T, true>(op, second, packs_all<H, W>(second), stream);
  if (bytes.parts > 0) {
    launch_sum<T>(op, second, stream);
  }
}

}  // namespace synergen::cuda::stream
