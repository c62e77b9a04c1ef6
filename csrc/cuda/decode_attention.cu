// decode_attention on the GPU: a block takes a row, a key-value head and a run of keys, and answers
// up to eight query heads from one reading of them. Warps take steps of keys in turn, each with an
// online softmax of its own; the block joins them in order, and where a row's keys are spread over
// several blocks a second launch joins those. Keys beyond a row's length or before its start are
// never read.
//
// Bound by memory: 2 * Dh elements a key and key-value head, each once. What hides the latency is
// bytes under way: a warp asks for a whole step (16 keys: 8 KB at Dh = 128 in 16 bits) before it
// needs any of it, a multiprocessor holds 16 warps, so 128 KB, where bandwidth times latency is 10
// KB on an A100 (2.0 TB/s, 0.5 us, 108 multiprocessors), 17 on an H100 (3.35, 0.65, 132), 4 on a
// 4090 (1.0, 0.55, 128), 38 on a B200 (8, 0.7, 148).
//
// Issue slots that a scheduler has for each 16 bytes a lane at full bandwidth: A100 153, H100 141,
// 4090 650, B200 74. With FMA a pack of 16 bits takes 8 conversions and, a query, 8 FMA and 7 for
// the sum over lanes and the softmax: 38 for 2 queries a key-value head, 68 for 4, 128 for 8, so
// from 4 on it would limit a B200, at 8 an H100. On tensor cores (decode_attention_mma.cuh) the
// loop is 385 instructions for 16 packs at Dh = 128 (24 each, of them 1.5 mma), 227 for 8 at Dh =
// 64 (28), whatever the group: a third of a B200's slots. An mma is 8 cycles, 12 a pack. The kernel
// here, in float32 at Dh = 128: 15 instructions a pack of keys and 29 a pack of values for 2
// queries, 47 and 60 for 8, so 54 of the 74.
//
// Time where it is short: 400 keys of 2 rows and 8 key-value heads are 3.3 MB, 1 us of an H100; a
// launch in a graph is 1.3 us and a round trip to memory 0.7. The launch is the limit, not the
// bytes: in 24 layers 91 us a token, 24 of them bytes, beside 900 us for the weights. So up to
// kWhole keys a block goes through a row alone, four steps a warp, 0.2 MB at 64 bytes a cycle: 1.3
// + 0.7 + 1.8 us on 16 multiprocessors, where two launches would be 1.3 + 0.7 + 0.6 and 1.3 + 0.8.
// Beyond, blocks of kSpan keys: 2,048 keys give those rows 128 blocks; writing and reading their
// parts, 2 * (Dh + 2) floats a query and span, is 0.8 % of the keys' and values' bytes for each
// query a key-value head. Neither depends on the batch, and spans count from the row's start, so a
// row's bits depend on its own keys and on S > kWhole alone. 16 keys or fewer are one warp.
#include "cuda/decode_attention_common.cuh"
#include "cuda/decode_attention_mma.cuh"

namespace synergen::cuda {
namespace {

using namespace decoding;

// Packs of values that a lane asks for at once: 2 KB a warp, and as much of the keys.
constexpr int kAhead = 4;

// All types, any dim, any strides: lane j of a warp takes key j of 32 for the logits, then lanes
// take the packs of a value, several values at once where one has few. A block takes `width` of
// out's elements; where dim has more, other blocks read the keys again.
template <class T, int N, int Q>
__global__ void __launch_bounds__(32 * kWarps, 1) decode_attention_kernel(DecodeLaunch launch) {
  using A = Acc<T>;
  SIMT_DYNAMIC_SHARED(shared);
  const DecodeAttentionParams& p = launch.p;
  const Task task(launch);
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  A* q = reinterpret_cast<A*>(shared);  // [Q, dim], zeros beyond the queries there are
  A* parts = q + Q * p.dim;
  for (int64_t i = threadIdx.x; i < Q * p.dim; i += blockDim.x) {
    const int64_t query = i / p.dim, d = i % p.dim;
    const T* row = static_cast<const T*>(p.q) + task.row * p.q_strides[0];
    q[i] = query < task.queries
               ? simt::widen(row[(task.head + query) * p.q_strides[1] + d * p.q_strides[2]])
               : A(0);
  }
  __syncthreads();
  const T* keys =
      static_cast<const T*>(p.k) + task.row * p.k_strides[0] + task.kv_head * p.k_strides[2];
  const T* values =
      static_cast<const T*>(p.v) + task.row * p.v_strides[0] + task.kv_head * p.v_strides[2];
  const int64_t packs = p.dim / N, first = task.slice * 32;
  int lanes = 1;  // for a value
  while (lanes < 32 && lanes < packs) lanes *= 2;
  const int64_t pack_of_lane = first + lane % lanes;
  A out[Q][N] = {}, peak[Q], total[Q] = {};
#pragma unroll
  for (int g = 0; g < Q; ++g) peak[g] = minus_infinity(A());
  const int64_t turn = kFmaKeys * static_cast<int64_t>(blockDim.x / 32);
  for (int64_t key = task.begin + warp * kFmaKeys; key < task.end; key += turn) {
    const int count = static_cast<int>(task.end - key < kFmaKeys ? task.end - key : kFmaKeys);
    A weight[Q] = {};
    if (lane < count) {
      const T* own = keys + (key + lane) * p.k_strides[1];
#pragma unroll kAhead
      for (int64_t i = 0; i < packs; ++i) {
        const Pack<T, N> pack = load_pack<N>(own, i, p.k_strides[3]);
#pragma unroll
        for (int g = 0; g < Q; ++g) {
          const Pack<A, N> query = load_pack<N>(q + g * p.dim, i, 1);
#pragma unroll
          for (int e = 0; e < N; ++e) weight[g] += query.v[e] * simt::widen(pack.v[e]);
        }
      }
    }
#pragma unroll
    for (int g = 0; g < Q; ++g) {
      weight[g] = lane < count ? weight[g] * static_cast<A>(p.scale) : minus_infinity(A());
      A most = weight[g] > peak[g] ? weight[g] : peak[g];
#pragma unroll
      for (int distance = 1; distance < 32; distance *= 2) {
        const A other = __shfl_xor_sync(kAll, most, distance);
        most = other > most ? other : most;
      }
      const A shrink = std::exp(peak[g] - most);
      weight[g] = std::exp(weight[g] - most);
      total[g] = total[g] * shrink + weight[g];
      peak[g] = most;
#pragma unroll
      for (int e = 0; e < N; ++e) out[g][e] *= shrink;
    }
    for (int from = lane / lanes; from - lane / lanes < count; from += kAhead * 32 / lanes) {
      Pack<T, N> pack[kAhead] = {};
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const int at = from + a * (32 / lanes);
        if (at < count && pack_of_lane < packs) {
          pack[a] =
              load_pack<N>(values + (key + at) * p.v_strides[1], pack_of_lane, p.v_strides[3]);
        }
      }
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
#pragma unroll
        for (int g = 0; g < Q; ++g) {
          const A w = __shfl_sync(kAll, weight[g], (from + a * (32 / lanes)) % 32);
#pragma unroll
          for (int e = 0; e < N; ++e) out[g][e] += w * simt::widen(pack[a].v[e]);
        }
      }
    }
  }
  const int64_t each = launch.width + 2;
  A* own = parts + warp * task.queries * each;
#pragma unroll
  for (int g = 0; g < Q; ++g) {
    total[g] = warp_sum(total[g]);
    for (int distance = lanes; distance < 32; distance *= 2) {
#pragma unroll
      for (int e = 0; e < N; ++e) out[g][e] += __shfl_xor_sync(kAll, out[g][e], distance);
    }
    if (g >= task.queries) continue;
    if (lane == 0)
      own[g * each + launch.width] = peak[g], own[g * each + launch.width + 1] = total[g];
    if (lane < lanes && pack_of_lane < packs) {
#pragma unroll
      for (int e = 0; e < N; ++e) own[g * each + lane * N + e] = out[g][e];
    }
  }
  finish<T>(launch, task, parts);
}

// The answers of query heads whose row's keys were split, a block each.
template <class T>
__global__ void __launch_bounds__(128) decode_attention_join_kernel(DecodeLaunch launch) {
  using A = Acc<T>;
  const DecodeAttentionParams& p = launch.p;
  const int64_t row = blockIdx.x, each = p.dim + 2;
  const Keys keys(p, row / p.heads);
  const int64_t parts = ceil_div(keys.end - keys.begin, launch.span);
  const A* part = static_cast<const A*>(p.scratch) + row * launch.splits * each;
  for (int64_t d = threadIdx.x; d < p.dim; d += blockDim.x) {
    const Joined<A> all(part, parts, each, d, p.dim);
    static_cast<T*>(p.out)[row * p.dim + d] = simt::narrow<T>(all.answer());
  }
}

int64_t splits_of(const DecodeAttentionParams& p) {
  return p.keys <= kWhole ? 1 : ceil_div(p.keys, kSpan);
}

template <class T>
int64_t part_bytes(int64_t width) {
  return (width + 2) * static_cast<int64_t>(sizeof(Acc<T>));
}

// A block for each row, key-value head, eight of its queries, slice of dim and split; as many warps
// as have keys.
template <class T>
void start(DecodeLaunch launch, void (*kernel)(DecodeLaunch), int64_t step, int64_t width,
           int64_t shared, void* stream) {
  const DecodeAttentionParams& p = launch.p;
  const int64_t group = p.heads / p.kv_heads, queries = group < kQueries ? group : kQueries;
  launch.width = width;
  launch.slices = ceil_div(p.dim, width);
  const int64_t blocks =
      p.batch * p.kv_heads * ceil_div(group, kQueries) * launch.slices * launch.splits;
  const int64_t steps = ceil_div(launch.span, step);
  const int64_t warps = steps < 1 ? 1 : steps < kWarps ? steps : kWarps;
  simt::launch("decode_attention", kernel, blocks_for("decode_attention", blocks, 1),
               dim3(static_cast<unsigned>(32 * warps)),
               static_cast<size_t>(shared + warps * queries * part_bytes<T>(width)), stream,
               launch);
}

// In packs of 16 bytes where all rows fit them.
template <class T, int Q>
void start_fma(const DecodeLaunch& launch, bool packed, void* stream) {
  const int64_t dim = launch.p.dim;
  const auto width = [&](int n) { return dim < 32 * n ? dim : int64_t{32} * n; };
  const int64_t shared = Q * dim * static_cast<int64_t>(sizeof(Acc<T>));
  if (packed) {
    constexpr int N = kPack<T>;
    start<T>(launch, decode_attention_kernel<T, N, Q>, kFmaKeys, width(N), shared, stream);
  } else {
    start<T>(launch, decode_attention_kernel<T, 1, Q>, kFmaKeys, width(1), shared, stream);
  }
}

// Whether tensor cores do it.
template <class T>
bool start_mma(const DecodeLaunch& launch, bool packed, void* stream) {
  const DecodeAttentionParams& p = launch.p;
  if constexpr (sizeof(T) == 2) {
    if (!packed || !packs<T>(p.q, p.q_strides[2], p.q_strides, 2)) return false;
    const int64_t shared = p.dim * 16;  // a warp's fragments of q
    if (p.dim == 64) {
      start<T>(launch, decode_attention_mma_kernel<T, 64>, kMmaKeys, 64, shared, stream);
    } else if (p.dim == 128) {
      start<T>(launch, decode_attention_mma_kernel<T, 128>, kMmaKeys, 128, shared, stream);
    } else {
      return false;
    }
    return true;
  } else {
    return false;
  }
}

template <class T>
void decode(const DecodeAttentionParams& p, void* stream) {
  const int64_t splits = splits_of(p);
  const DecodeLaunch launch{p, splits, splits == 1 ? p.keys : kSpan, 1, p.dim};
  const bool packed = p.dim % kPack<T> == 0 && packs<T>(p.k, p.k_strides[3], p.k_strides, 3) &&
                      packs<T>(p.v, p.v_strides[3], p.v_strides, 3);
  if (!start_mma<T>(launch, packed, stream)) {
    if (p.heads / p.kv_heads <= 2) {
      start_fma<T, 2>(launch, packed, stream);
    } else {
      start_fma<T, kQueries>(launch, packed, stream);
    }
  }
  if (splits > 1) {
    simt::launch("decode_attention", decode_attention_join_kernel<T>,
                 blocks_for("decode_attention", p.batch * p.heads, 1),
                 dim3(threads_for(p.dim, 1, 128)), 0, stream, launch);
  }
}

}  // namespace

int64_t scratch_bytes(const DecodeAttentionParams& p) {
  const int64_t splits = splits_of(p), size = p.dtype == DType::kFloat64 ? 8 : 4;
  return splits == 1 ? 0 : p.batch * p.heads * splits * (p.dim + 2) * size;
}

void decode_attention(const DecodeAttentionParams& p, void* stream) {
  dispatch_float(p.dtype, [&](auto tag) { decode<typename decltype(tag)::type>(p, stream); });
}

}  // namespace synergen::cuda
