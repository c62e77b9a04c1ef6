// fold_tokens on the CPU: gather, add the position embedding and lay windows out, in one pass over
// the output.
#include "common/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/vec.h"
#include "kernels.h"

namespace synergen::cpu::SYNERGEN_ISA {
namespace {

constexpr int64_t kGrain = 16384;

// Where token (row, col) of a raster lies among the windows.
struct Slot {
  int64_t window, inside;
};
template <class P>
Slot slot_of(const P& p, int64_t row, int64_t col) {
  return {row / p.m * (p.w / p.n) + col / p.n, row % p.m * p.n + col % p.n};
}

template <class T>
void forward(const FoldTokensParams& p) {
  using A = Acc<T>;
  using V = VecOf<T>;
  const int64_t width = p.m * p.n * p.dim, windows = (p.h / p.m) * (p.w / p.n);
  // One item is a row of one image's tokens.
  parallel_for(p.batch * p.h, ceil_div(kGrain, p.w * p.dim), [&](int64_t begin, int64_t end) {
    Scratch<A> a(p.dim), b(p.dim);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t image = item / p.h, row = item % p.h;
      for (int64_t col = 0; col < p.w; ++col) {
        const int64_t id =
            p.ids[image * p.ids_strides[0] + row * p.ids_strides[1] + col * p.ids_strides[2]];
        const Slot slot = slot_of(p, row, col);
        T* y = static_cast<T*>(p.y) + (image * windows + slot.window) * width + slot.inside * p.dim;
        load_row(static_cast<const T*>(p.table) + id * p.table_strides[0], p.table_strides[1],
                 p.dim, a.data());
        load_row(static_cast<const T*>(p.pos) + row * p.pos_strides[0] + col * p.pos_strides[1],
                 p.pos_strides[2], p.dim, b.data());
        int64_t i = 0;
        for (; i + V::N <= p.dim; i += V::N)
          (V::load(a.data() + i) + V::load(b.data() + i)).store(y + i);
        for (; i < p.dim; ++i) from_float(a[i] + b[i], y[i]);
      }
    }
  });
}

// sum += the gradient of token (image, row, col)
template <class T, class A>
void add_token(const FoldTokensBackwardParams& p, int64_t image, int64_t row, int64_t col,
               A* buffer, A* sum) {
  using V = VecOf<T>;
  const Slot slot = slot_of(p, row, col);
  const T* dy = static_cast<const T*>(p.dy) + image * p.dy_strides[0] +
                slot.window * p.dy_strides[1] + slot.inside * p.dim * p.dy_strides[2];
  load_row(dy, p.dy_strides[2], p.dim, buffer);
  int64_t i = 0;
  for (; i + V::N <= p.dim; i += V::N) (V::load(sum + i) + V::load(buffer + i)).store(sum + i);
  for (; i < p.dim; ++i) sum[i] += buffer[i];
}

template <class A>
void clear(A* sum, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sum[i] = 0;
}

// Every sum runs over its tokens in raster order, image after image, whatever the number of
// threads.
template <class T>
void backward(const FoldTokensBackwardParams& p) {
  using A = Acc<T>;
  const int64_t raster = p.h * p.w, tokens = p.batch * raster;
  parallel_for(raster, ceil_div(kGrain, p.dim * p.batch + 1), [&](int64_t begin, int64_t end) {
    Scratch<A> sum(p.dim), buffer(p.dim);
    for (int64_t at = begin; at < end; ++at) {
      clear(sum.data(), p.dim);
      for (int64_t image = 0; image < p.batch; ++image) {
        add_token<T>(p, image, at / p.w, at % p.w, buffer.data(), sum.data());
      }
      store_row(sum.data(), p.dim, static_cast<T*>(p.dpos) + at * p.dim);
    }
  });

  // Counting sort: order[first[id] .. first[id + 1]) are the tokens with that id, in raster order.
  Scratch<int64_t> first(p.vocab + 2), order(tokens);
  for (int64_t id = 0; id < p.vocab + 2; ++id) first[id] = 0;
  const auto id_at = [&](int64_t token) {
    const int64_t image = token / raster, row = token % raster / p.w, col = token % p.w;
    return p.ids[image * p.ids_strides[0] + row * p.ids_strides[1] + col * p.ids_strides[2]];
  };
  for (int64_t token = 0; token < tokens; ++token) ++first[id_at(token) + 2];
  for (int64_t id = 0; id < p.vocab; ++id) first[id + 2] += first[id + 1];
  for (int64_t token = 0; token < tokens; ++token) order[first[id_at(token) + 1]++] = token;
  parallel_for(p.vocab, ceil_div(kGrain, p.dim + 1), [&](int64_t begin, int64_t end) {
    Scratch<A> sum(p.dim), buffer(p.dim);
    for (int64_t id = begin; id < end; ++id) {
      clear(sum.data(), p.dim);
      for (int64_t i = first[id]; i < first[id + 1]; ++i) {
        const int64_t at = order[i] % raster;
        add_token<T>(p, order[i] / raster, at / p.w, at % p.w, buffer.data(), sum.data());
      }
      store_row(sum.data(), p.dim, static_cast<T*>(p.dtable) + id * p.dim);
    }
  });
}

}  // namespace

void fold_tokens(const FoldTokensParams& p) {
  dispatch_float(p.dtype, [&](auto tag) { forward<typename decltype(tag)::type>(p); });
}

void fold_tokens_backward(const FoldTokensBackwardParams& p) {
  dispatch_float(p.dtype, [&](auto tag) { backward<typename decltype(tag)::type>(p); });
}

void fold_ids(const FoldIdsParams& p) {
  const int64_t windows = (p.h / p.m) * (p.w / p.n), width = p.m * p.n;
  for (int64_t image = 0; image < p.batch; ++image) {
    for (int64_t row = 0; row < p.h; ++row) {
      for (int64_t col = 0; col < p.w; ++col) {
        const Slot slot = slot_of(p, row, col);
        if (p.unfold) {
          p.y[(image * p.h + row) * p.w + col] =
              p.ids[image * p.strides[0] + slot.window * p.strides[1] + slot.inside * p.strides[2]];
        } else {
          p.y[(image * windows + slot.window) * width + slot.inside] =
              p.ids[image * p.strides[0] + row * p.strides[1] + col * p.strides[2]];
        }
      }
    }
  }
}

}  // namespace synergen::cpu::SYNERGEN_ISA
