// The gradients of fold_tokens on the GPU, the same bits on every run and every card: no sum uses
// an atomic. dpos adds the pictures in order. dtable sorts the tokens by id (stably, so a sum runs
// over its tokens in raster order), then adds runs of kPiece sorted tokens in parallel: an id that
// fills several runs, as a white background does, has its parts added in order afterwards.
#include <stdexcept>
#include <utility>

#include "cuda/access.cuh"
#include "kernels.h"

namespace synergen::cuda {
namespace {

constexpr int kDigit = 256;    // values of one digit of the radix sort
constexpr int kTile = 1024;    // tokens that one warp sorts
constexpr int kWarps = 4;      // tiles of a block
constexpr int kPiece = 256;    // sorted tokens that one block adds
constexpr int kAhead = 4;      // rows under way together
constexpr int kColumns = 128;  // threads along a token vector
constexpr unsigned kAll = 0xffffffffu;

// Everything the launches share. Keys and tokens are 32-bit: with as many tokens, dy would be
// gigabytes for every byte of a token vector.
struct Backward : FoldTokensBackwardParams {
  int64_t tokens, tiles, pieces;
  int32_t *keys, *order;              // [tokens]: ids, vocab where out of range; and their tokens
  int32_t *other_keys, *other_order;  // the same for the next pass
  int32_t* counts;                    // [kDigit, tiles]
  int32_t* first;                     // [vocab + 1]: where each id begins among the sorted
  void *heads, *tails;  // [pieces, dim]: parts that began before a piece, or go on after it
  int shift;
};

// dy of token t: one vector of dim elements.
template <class T>
SIMT_FN const T* token_row(const Backward& p, int64_t token) {
  const int64_t raster = p.h * p.w, image = token / raster, at = token % raster;
  const int64_t row = at / p.w, col = at % p.w;
  const int64_t window = row / p.m * (p.w / p.n) + col / p.n, inside = row % p.m * p.n + col % p.n;
  return static_cast<const T*>(p.dy) + image * p.dy_strides[0] + window * p.dy_strides[1] +
         inside * p.dim * p.dy_strides[2];
}

__global__ void __launch_bounds__(256) fill_keys_kernel(Backward p) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (t >= p.tokens) return;
  const int64_t raster = p.h * p.w;
  const int64_t image = t / raster, row = t % raster / p.w, col = t % p.w;
  const int64_t id =
      p.ids[image * p.ids_strides[0] + row * p.ids_strides[1] + col * p.ids_strides[2]];
  p.keys[t] = static_cast<int32_t>(id >= 0 && id < p.vocab ? id : p.vocab);
  p.order[t] = static_cast<int32_t>(t);
}

SIMT_FN int digit_of(int32_t key, int shift) { return key >> shift & (kDigit - 1); }

// counts[digit, tile], one warp a tile.
__global__ void __launch_bounds__(32 * kWarps) count_digits_kernel(Backward p) {
  SIMT_SHARED(int32_t, counters, [kWarps][kDigit]);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t tile = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  for (int d = lane; d < kDigit; d += 32) counters[warp][d] = 0;
  __syncwarp();
  for (int64_t t = tile * kTile + lane; t < (tile + 1) * kTile && t < p.tokens; t += 32) {
    atomicAdd(&counters[warp][digit_of(p.keys[t], p.shift)], 1);
  }
  __syncwarp();
  for (int d = lane; d < kDigit && tile < p.tiles; d += 32) {
    p.counts[d * p.tiles + tile] = counters[warp][d];
  }
}

// counts becomes its own exclusive running sum. One block: there are 256 numbers for 1024 tokens.
__global__ void __launch_bounds__(1024) scan_counts_kernel(Backward p) {
  SIMT_SHARED(int32_t, warps, [32]);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t total = kDigit * p.tiles, each = ceil_div(total, 1024);
  const int64_t begin = threadIdx.x * each, end = begin + each < total ? begin + each : total;
  int32_t own = 0;
  for (int64_t i = begin; i < end; ++i) own += p.counts[i];
  int32_t sum = own;
  for (int distance = 1; distance < 32; distance *= 2) {
    const int32_t below = __shfl_up_sync(kAll, sum, distance);
    sum += lane >= distance ? below : 0;
  }
  if (lane == 31) warps[warp] = sum;
  __syncthreads();
  int32_t before = sum - own;
  for (int w = 0; w < warp; ++w) before += warps[w];
  for (int64_t i = begin; i < end; ++i) {
    const int32_t count = p.counts[i];
    p.counts[i] = before;
    before += count;
  }
}

// Tokens go to their places by this digit, those of one digit in the order they came.
__global__ void __launch_bounds__(32 * kWarps) scatter_kernel(Backward p) {
  SIMT_SHARED(int32_t, next, [kWarps][kDigit]);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t tile = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  for (int d = lane; d < kDigit && tile < p.tiles; d += 32) {
    next[warp][d] = p.counts[d * p.tiles + tile];
  }
  __syncwarp();
  for (int64_t begin = tile * kTile; begin < (tile + 1) * kTile && begin < p.tokens; begin += 32) {
    const int64_t t = begin + lane;
    const bool there = t < p.tokens;
    const int32_t key = there ? p.keys[t] : 0;
    const int digit =
        digit_of(key, p.shift);  // lanes past the end come last: nobody ranks after them
    const unsigned same = __match_any_sync(kAll, static_cast<unsigned>(digit));
    const int rank = __popc(same & ((1u << lane) - 1));
    const int32_t place = there ? next[warp][digit] + rank : 0;
    __syncwarp();
    if (there && rank == 0) next[warp][digit] += __popc(same);
    __syncwarp();
    if (there) {
      p.other_keys[place] = key;
      p.other_order[place] = p.order[t];
    }
  }
}

// first[id] = how many sorted keys are smaller.
__global__ void __launch_bounds__(256) find_segments_kernel(Backward p) {
  const int64_t id = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (id > p.vocab) return;
  int64_t low = 0, high = p.tokens;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (p.keys[middle] < id) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  p.first[id] = static_cast<int32_t>(low);
}

// One piece of sorted tokens, one pack of columns a thread.
template <class T, int N>
__global__ void __launch_bounds__(kColumns) sum_pieces_kernel(Backward p) {
  using A = Acc<T>;
  const int64_t i = static_cast<int64_t>(blockIdx.y) * kColumns + threadIdx.x;
  if (i >= p.dim / N) return;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kPiece;
  const int64_t end = begin + kPiece < p.tokens ? begin + kPiece : p.tokens;
  int32_t id = p.keys[begin];
  A sum[N] = {};
  const auto flush = [&] {
    if (id == p.vocab) return;  // tokens out of range belong to no row
    const bool began = p.first[id] >= begin, ends = p.first[id + 1] <= end;
    if (began && ends) {
      Pack<T, N> out;
      for (int e = 0; e < N; ++e) out.v[e] = simt::narrow<T>(sum[e]);
      store_pack(static_cast<T*>(p.dtable) + id * p.dim, i, out);
    } else {
      A* part = static_cast<A*>(began ? p.tails : p.heads) + blockIdx.x * p.dim + i * N;
      for (int e = 0; e < N; ++e) part[e] = sum[e];
    }
  };
  for (int64_t at = begin; at < end; at += kAhead) {
    Pack<T, N> rows[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (at + k < end) {
        rows[k] = load_pack<N>(token_row<T>(p, p.order[at + k]), i, p.dy_strides[2]);
      }
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (at + k >= end) continue;
      if (p.keys[at + k] != id) {
        flush();
        id = p.keys[at + k];
        for (int e = 0; e < N; ++e) sum[e] = 0;
      }
      for (int e = 0; e < N; ++e) sum[e] += simt::widen(rows[k].v[e]);
    }
  }
  flush();
}

// Rows of ids without tokens, and of ids whose tokens fill more than one piece.
template <class T>
__global__ void __launch_bounds__(kColumns) finish_table_kernel(Backward p) {
  using A = Acc<T>;
  const int64_t id = blockIdx.x;
  const int64_t begin = p.first[id], end = p.first[id + 1];
  const int64_t from = begin / kPiece, to = (end - 1) / kPiece;
  if (begin < end && from == to) return;  // written already
  for (int64_t i = threadIdx.x; i < p.dim; i += kColumns) {
    A sum = begin < end ? static_cast<const A*>(p.tails)[from * p.dim + i] : A(0);
    for (int64_t piece = from + 1; begin < end && piece <= to; ++piece) {
      sum += static_cast<const A*>(p.heads)[piece * p.dim + i];
    }
    static_cast<T*>(p.dtable)[id * p.dim + i] = simt::narrow<T>(sum);
  }
}

// dpos[row, col] = the sum of dy over the pictures.
template <class T, int N>
__global__ void __launch_bounds__(kColumns) sum_pictures_kernel(Backward p) {
  const int64_t raster = p.h * p.w, i = static_cast<int64_t>(blockIdx.y) * kColumns + threadIdx.x;
  if (i >= p.dim / N) return;
  const int64_t at = blockIdx.x;
  Acc<T> sum[N] = {};
  for (int64_t image = 0; image < p.batch; image += kAhead) {
    Pack<T, N> rows[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (image + k < p.batch) {
        rows[k] = load_pack<N>(token_row<T>(p, (image + k) * raster + at), i, p.dy_strides[2]);
      }
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      if (image + k >= p.batch) continue;
      for (int e = 0; e < N; ++e) sum[e] += simt::widen(rows[k].v[e]);
    }
  }
  Pack<T, N> out;
  for (int e = 0; e < N; ++e) out.v[e] = simt::narrow<T>(sum[e]);
  store_pack(static_cast<T*>(p.dpos) + at * p.dim, i, out);
}

// Where each array lies in the scratch memory; returns the bytes of all.
int64_t lay_out(Backward& p) {
  const auto base = reinterpret_cast<uintptr_t>(p.scratch);  // null where only the size is asked
  int64_t bytes = 0;
  const auto take = [&](auto*& pointer, int64_t size) {
    pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(
        base + static_cast<uintptr_t>(bytes));
    bytes += ceil_div(size, 256) * 256;
  };
  const int64_t part = p.pieces * p.dim * (p.dtype == DType::kFloat64 ? 8 : 4);
  take(p.keys, p.tokens * 4);
  take(p.order, p.tokens * 4);
  take(p.other_keys, p.tokens * 4);
  take(p.other_order, p.tokens * 4);
  take(p.counts, kDigit * p.tiles * 4);
  take(p.first, (p.vocab + 1) * 4);
  char *heads, *tails;
  take(heads, part);
  take(tails, part);
  p.heads = heads;
  p.tails = tails;
  return bytes;
}

Backward prepare(const FoldTokensBackwardParams& params) {
  Backward p{};
  static_cast<FoldTokensBackwardParams&>(p) = params;
  p.tokens = p.batch * p.h * p.w;
  p.tiles = ceil_div(p.tokens, kTile);
  p.pieces = ceil_div(p.tokens, kPiece);
  return p;
}

void sort_by_id(Backward& p, void* stream) {
  const char* op = "fold_tokens_backward";
  const dim3 tiles(static_cast<unsigned>(ceil_div(p.tiles, kWarps)));
  if (p.tokens > 0) {
    simt::launch(op, fill_keys_kernel, blocks_for(op, p.tokens, 256), dim3(256), 0, stream, p);
  }
  for (p.shift = 0; p.tokens > 0 && p.vocab >> p.shift; p.shift += 8) {
    simt::launch(op, count_digits_kernel, tiles, dim3(32 * kWarps), 0, stream, p);
    simt::launch(op, scan_counts_kernel, dim3(1), dim3(1024), 0, stream, p);
    simt::launch(op, scatter_kernel, tiles, dim3(32 * kWarps), 0, stream, p);
    std::swap(p.keys, p.other_keys);
    std::swap(p.order, p.other_order);
  }
  simt::launch(op, find_segments_kernel, blocks_for(op, p.vocab + 1, 256), dim3(256), 0, stream, p);
}

template <class T, int N>
void sum_tokens(const Backward& p, void* stream) {
  const char* op = "fold_tokens_backward";
  const unsigned columns = static_cast<unsigned>(ceil_div(p.dim / N, kColumns));
  if (p.dim == 0) return;
  if (p.tokens > 0) {
    simt::launch(op, sum_pieces_kernel<T, N>, dim3(static_cast<unsigned>(p.pieces), columns),
                 dim3(kColumns), 0, stream, p);
  }
  if (p.vocab > 0) {
    simt::launch(op, finish_table_kernel<T>, blocks_for(op, p.vocab, 1), dim3(kColumns), 0, stream,
                 p);
  }
  if (p.h * p.w > 0) {
    simt::launch(op, sum_pictures_kernel<T, N>, dim3(static_cast<unsigned>(p.h * p.w), columns),
                 dim3(kColumns), 0, stream, p);
  }
}

}  // namespace

int64_t scratch_bytes(const FoldTokensBackwardParams& params) {
  Backward p = prepare(params);
  return lay_out(p);
}

void fold_tokens_backward(const FoldTokensBackwardParams& params, void* stream) {
  Backward p = prepare(params);
  if (p.tokens > INT32_MAX || p.vocab > INT32_MAX) {
    throw std::invalid_argument("fold_tokens_backward: tokens and V must be below 2^31");
  }
  lay_out(p);
  sort_by_id(p, stream);
  dispatch_float(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool packed = p.dim % kPack<T> == 0 && packs<T>(p.dy, p.dy_strides[2], p.dy_strides, 2) &&
                        packs<T>(p.dtable, 1, nullptr, 0) && packs<T>(p.dpos, 1, nullptr, 0);
    if (packed) {
      sum_tokens<T, kPack<T>>(p, stream);
    } else {
      sum_tokens<T, 1>(p, stream);
    }
  });
}

}  // namespace synergen::cuda
