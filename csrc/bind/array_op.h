// Turns a host function of csrc/ops/ into a plain Python function over arrays: anything with the
// buffer protocol (NumPy, array, memoryview) or with DLPack (torch, JAX, CuPy). No torch in the
// call.
#pragma once

#include <pybind11/pybind11.h>

#include "cuda/device.h"
#include "ops/ops.h"

namespace synergen::bind {

namespace py = pybind11;

// A view of a Python array; its memory lives as long as the view. `stream` is where a CUDA array
// will be used.
Tensor view_of(const char* op, const char* name, const py::object& array, int64_t stream,
               bool writable = false);

// Outputs come from `out` (an array, or a tuple of them in order) or are fresh NumPy arrays.
class ArrayCall : public Call {
 public:
  ArrayCall(const char* op, const Tensor& first, py::object out, int64_t stream);
  ~ArrayCall() override;
  Tensor empty(const char* name, const Sizes& sizes, DType dtype) override;
  void* scratch(int64_t bytes) override;
  py::object result() const;  // what the caller gets: one array or a tuple

 private:
  const char* op_;
  std::vector<py::object> given_;
  std::vector<py::object> made_;
  std::vector<void*> scratch_;
#ifdef SYNERGEN_WITH_CUDA
  std::optional<cuda::DeviceScope> scope_;
#endif
};

template <class T>
struct ToArray {
  using type = T;
  static const T& in(const char*, const char*, const T& x, int64_t) { return x; }
};
template <>
struct ToArray<Tensor> {
  using type = py::object;
  static Tensor in(const char* op, const char* name, const py::object& x, int64_t stream) {
    return view_of(op, name, x, stream);
  }
};
template <>
struct ToArray<std::optional<Tensor>> {
  using type = py::object;
  static std::optional<Tensor> in(const char* op, const char* name, const py::object& x,
                                  int64_t stream) {
    return x.is_none() ? std::nullopt : std::optional<Tensor>(view_of(op, name, x, stream));
  }
};
template <>
struct ToArray<std::vector<Tensor>> {
  using type = py::sequence;
  static std::vector<Tensor> in(const char* op, const char* name, const py::sequence& x,
                                int64_t stream) {
    std::vector<Tensor> views;
    for (py::handle each : x) {
      const std::string place = std::string(name) + "[" + std::to_string(views.size()) + "]";
      views.push_back(view_of(op, place.c_str(), py::reinterpret_borrow<py::object>(each), stream));
    }
    return views;
  }
};

template <class F>
struct ArrayOp;

template <class R, class First, class... Rest>
struct ArrayOp<R(Call&, First, Rest...)> {
  template <class T>
  using As = ToArray<std::remove_cvref_t<T>>;

  // args: one py::arg per parameter of the host function after Call.
  template <class... Args>
  static void define(py::module_& m, const char* op, R (*fn)(Call&, First, Rest...),
                     const Args&... args) {
    static_assert(sizeof...(Args) == 1 + sizeof...(Rest), "one py::arg per parameter");
    const std::vector<const char*> names = {args.name...};
    m.def(
        op,
        [op, fn, names](const py::object& first, const typename As<Rest>::type&... rest,
                        py::object out, int64_t stream) {
          const Tensor view = view_of(op, names[0], first, stream);
          const auto views =
              views_of(op, names, stream, std::index_sequence_for<Rest...>(), rest...);
          ArrayCall call(op, view, std::move(out), stream);
          {
            py::gil_scoped_release release;
            std::apply([&](const auto&... each) { fn(call, view, each...); }, views);
          }
          return call.result();
        },
        args..., py::kw_only(), py::arg("out") = py::none(), py::arg("stream") = 0);
  }

 private:
  template <size_t... I>
  static std::tuple<std::remove_cvref_t<Rest>...> views_of(const char* op,
                                                           const std::vector<const char*>& names,
                                                           int64_t stream,
                                                           std::index_sequence<I...>,
                                                           const typename As<Rest>::type&... rest) {
    return {As<Rest>::in(op, names[I + 1], rest, stream)...};
  }
};

}  // namespace synergen::bind

#define SYNERGEN_ARRAY_OP(m, fn, ...) \
  synergen::bind::ArrayOp<decltype(fn)>::define(m, #fn, &fn, __VA_ARGS__)
