#include "bind/engine.h"

#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include "bind/array_op.h"
#include "engine/engine.h"
#include "engine/params.h"
#include "engine/workspace.h"

namespace synergen::bind {
namespace {

using namespace engine;

constexpr const char* kFormats[] = {"float32", "bfloat16", "int8", "int4"};

Format format_of(const std::string& name) {
  for (int f = 0; f < 4; ++f) {
    if (name == kFormats[f]) return static_cast<Format>(f);
  }
  refuse("engine: format must be float32, bfloat16, int8 or int4, got ", name);
}

py::object new_array(const char* dtype, const std::vector<int64_t>& sizes) {
  py::tuple shape(sizes.size());
  for (size_t d = 0; d < sizes.size(); ++d) shape[d] = py::int_(sizes[d]);
  return py::module_::import("numpy").attr("empty")(shape, dtype);
}

// Floats [rows, columns], contiguous.
Tensor floats(const char* name, const py::object& array, int64_t columns) {
  const Tensor t = view_of("engine", name, array, 0);
  check_dims("engine", name, t, "[rows, columns]", 2);
  check_dtype("engine", name, t, {DType::kFloat32});
  const bool gaps =
      (t.size(1) > 1 && t.stride(1) != 1) || (t.size(0) > 1 && t.stride(0) != t.size(1));
  if (t.size(1) != columns || gaps) {
    refuse("engine: ", name, " must be contiguous [rows, ", columns, "], got ", to_string(t.sizes));
  }
  return t;
}

// int64, contiguous, of so many dimensions.
Tensor integers(const char* name, const py::object& array, const char* form, int64_t dims) {
  const Tensor t = view_of("engine", name, array, 0);
  check_dims("engine", name, t, form, dims);
  check_dtype("engine", name, t, {DType::kInt64});
  int64_t step = 1;
  for (int64_t d = dims; d-- > 0; step *= t.size(d)) {
    if (t.size(d) > 1 && t.stride(d) != step) refuse("engine: ", name, " must be contiguous");
  }
  return t;
}

Pictures pictures_of(const py::object& image_ids, Tensor& keep) {
  if (image_ids.is_none()) return {};
  keep = integers("image_ids", image_ids, "[N, h, w]", 3);
  return {keep.ptr<int64_t>(), keep.size(0), keep.size(1), keep.size(2)};
}

// What a callback of Python answers; None means go on. Ctrl-C is noticed here.
bool goes_on(const py::object& answer) {
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  return answer.is_none() || py::cast<bool>(answer);
}

py::memoryview bytes_of(const void* data, int64_t n) {
  return py::memoryview::from_memory(data, static_cast<py::ssize_t>(n));
}

void define_matrix(py::module_& m) {
  py::class_<Packed>(m, "PackedMatrix")
      .def_static(
          "pack",
          [](const std::string& name, const py::object& array, const std::string& format,
             int64_t group) {
            const Tensor from = view_of("engine", name.c_str(), array, 0);
            const Format to = format_of(format);
            py::gil_scoped_release release;
            return pack(name, from, to, group);
          },
          py::arg("name"), py::arg("array"), py::arg("format"), py::arg("group") = 0)
      .def_static(
          "view",
          [](const std::string& name, const std::string& format, int64_t rows, int64_t columns,
             int64_t group, const py::object& data, const py::object& scales) {
            std::optional<Tensor> by;
            if (!scales.is_none()) by = view_of("engine", name.c_str(), scales, 0);
            return packed_view(name, format_of(format), rows, columns, group,
                               view_of("engine", name.c_str(), data, 0), by);
          },
          py::arg("name"), py::arg("format"), py::arg("rows"), py::arg("columns"), py::arg("group"),
          py::arg("data"), py::arg("scales") = py::none())
      .def_property_readonly(
          "format", [](const Packed& p) { return kFormats[static_cast<int>(p.matrix.format)]; })
      .def_property_readonly("rows", [](const Packed& p) { return p.matrix.rows; })
      .def_property_readonly("columns", [](const Packed& p) { return p.matrix.columns; })
      .def_property_readonly("group", [](const Packed& p) { return p.matrix.group; })
      .def_property_readonly("nbytes", [](const Packed& p) { return p.matrix.bytes(); })
      .def(
          "data", [](const Packed& p) { return bytes_of(p.matrix.data, p.matrix.data_bytes()); },
          py::keep_alive<0, 1>())
      .def(
          "scales",
          [](const Packed& p) {
            return bytes_of(p.matrix.scales, p.matrix.scale_count() * int64_t{sizeof(bf16)});
          },
          py::keep_alive<0, 1>())
      .def("read",
           [](const Packed& p) {  // its bytes, in 8-byte words added up
             uint64_t sum = 0;
             py::gil_scoped_release release;
             cpu::read_bytes({p.matrix.data, p.matrix.data_bytes() / kLine, &sum});
             return sum;
           })
      .def(
          "linear",
          [](const Packed& p, const py::object& x, py::object out, bool swiglu, bool short_x) {
            const Tensor from = floats("x", x, p.matrix.columns);
            if (swiglu && p.matrix.rows % (2 * kPanel)) {
              refuse("engine: rows must be a multiple of 32 for swiglu, got ", p.matrix.rows);
            }
            const int64_t columns = swiglu ? p.matrix.rows / 2 : p.matrix.rows;
            if (out.is_none()) out = new_array("float32", {from.size(0), columns});
            const Tensor to = floats("out", out, columns);
            if (to.size(0) != from.size(0)) refuse("engine: out must have the rows of x");
            {
              py::gil_scoped_release release;
              PackedLinearParams l{p.matrix,         swiglu ? Epilogue::kSwiglu : Epilogue::kStore,
                                   from.size(0),     from.ptr<float>(),
                                   p.matrix.columns, nullptr,
                                   nullptr,          to.ptr<float>(),
                                   columns,          nullptr,
                                   short_x,          nullptr};
              Workspace workspace;
              l.scratch = workspace.fit(scratch_bytes(l));
              cpu::packed_linear(l);
            }
            return out;
          },
          py::arg("x"), py::arg("out") = py::none(), py::arg("swiglu") = false,
          py::arg("short_x") = false);
}

engine::Sizes sizes_of(const py::dict& given) {
  engine::Sizes s{};
  const auto whole_number = [&](const char* name) {
    const int64_t value = py::cast<int64_t>(given[name]);
    if (value < 1 || value > int64_t{1} << 31) {
      refuse("engine: ", name, " must be in [1, 2^31], got ", value);
    }
    return value;
  };
  s.dim = whole_number("dim");
  s.hidden = whole_number("hidden");
  s.layers = whole_number("layers");
  s.heads = whole_number("heads");
  s.kv_heads = whole_number("kv_heads");
  s.head_dim = whole_number("head_dim");
  s.max_positions = whole_number("max_positions");
  s.vocab = whole_number("vocab");
  s.specials = whole_number("specials");
  s.codebook = whole_number("codebook");
  s.fold_rows = whole_number("fold_rows");
  s.fold_columns = whole_number("fold_columns");
  s.grid_rows = whole_number("grid_rows");
  s.grid_columns = whole_number("grid_columns");
  s.token_dim = whole_number("token_dim");
  s.head_layers = whole_number("head_layers");
  s.short_prompts = py::cast<bool>(given["short_prompts"]);
  s.eps = py::cast<double>(given["eps"]);
  s.theta = py::cast<double>(given["theta"]);
  if (s.heads % s.kv_heads || s.head_dim % 2 || s.specials != 3) {
    refuse("engine: heads must be a multiple of kv_heads, head_dim even and specials 3");
  }
  return s;
}

Sampling sampling_of(const py::tuple& given) {
  return {py::cast<double>(given[0]), py::cast<int64_t>(given[1]), py::cast<double>(given[2])};
}

// A caller's function as the loops call it, without the GIL.
Progress progress_of(const py::object& given, const py::object& ids) {
  return [&given, &ids](int64_t done, int64_t total, const int64_t*) {
    py::gil_scoped_acquire gil;
    return goes_on(given.is_none() ? py::object(py::none()) : given(done, total, ids));
  };
}

py::object paint(Engine& e, const std::vector<Ids>& prompts, const Ids& unconditional,
                 const Ids& seeds, double guidance, const py::tuple& sampling, int64_t rows,
                 int64_t columns, const py::object& on_patch) {
  if (rows < 1 || columns < 1 || rows > 1 << 20 || columns > 1 << 20) {
    refuse("engine: rows and columns must be in [1, 2^20], got ", rows, " and ", columns);
  }
  py::object ids = new_array("int64", {static_cast<int64_t>(prompts.size()), rows, columns});
  const Tensor to = integers("ids", ids, "[N, h, w]", 3);
  const Progress progress = progress_of(on_patch, ids);
  const Sampling how = sampling_of(sampling);
  py::gil_scoped_release release;
  e.paint(prompts, unconditional, seeds, guidance, how, rows, columns, progress, to.ptr<int64_t>());
  return ids;
}

std::vector<Ids> generate_text(Engine& e, const std::vector<Ids>& prompts,
                               const py::object& image_ids, int64_t max_new_tokens,
                               const Ids& stop_ids, const py::tuple& sampling, const Ids& seeds,
                               const py::object& on_token) {
  Tensor keep;
  const Prompts all{prompts, pictures_of(image_ids, keep)};
  const Sampling how = sampling_of(sampling);
  const auto tell = [&](int64_t row, int64_t id) {
    py::gil_scoped_acquire gil;
    return goes_on(on_token.is_none() ? py::object(py::none()) : on_token(row, id));
  };
  py::gil_scoped_release release;
  return e.generate_text(all, max_new_tokens, stop_ids, how, seeds, tell);
}

py::list generate_interleaved(Engine& e, const Ids& prompt, const py::object& image_ids,
                              const Ids& unconditional, int64_t max_new_tokens, const Ids& stop_ids,
                              int64_t seed, double guidance, const py::tuple& text,
                              const py::tuple& image, const py::object& on_progress) {
  Tensor keep;
  const Prompts all{{prompt}, pictures_of(image_ids, keep)};
  const Sampling words = sampling_of(text), codes = sampling_of(image);
  const py::none nothing;
  const Progress progress = [&](int64_t done, int64_t total, const int64_t*) {
    py::gil_scoped_acquire gil;
    return goes_on(on_progress.is_none() ? py::object(nothing) : on_progress(done, total));
  };
  std::vector<Segment> segments;
  {
    py::gil_scoped_release release;
    segments = e.generate_interleaved(all, unconditional, max_new_tokens, stop_ids, seed, guidance,
                                      words, codes, progress);
  }
  py::list out;
  const engine::Sizes& s = e.weights.sizes;
  for (const Segment& each : segments) {
    if (each.picture.empty()) {
      out.append(py::cast(each.words));
      continue;
    }
    const py::object ids = new_array("int64", {s.grid_rows, s.grid_columns});
    const Tensor to = integers("ids", ids, "[h, w]", 2);
    std::copy(each.picture.begin(), each.picture.end(), to.ptr<int64_t>());
    out.append(ids);
  }
  return out;
}

}  // namespace

void define_engine(py::module_& m) {
  define_matrix(m);
  py::register_exception<Cancelled>(m, "Cancelled", PyExc_RuntimeError);
  py::register_exception<NotFinite>(m, "NotFinite", PyExc_FloatingPointError);
  using py::arg;
  py::class_<Engine>(m, "Engine")
      .def(
          py::init([](const py::dict& sizes) { return std::make_unique<Engine>(sizes_of(sizes)); }),
          arg("sizes"))
      .def("put",
           [](Engine& e, const std::string& name, const Packed& p) { e.weights.put(name, p); })
      .def("put_vector",
           [](Engine& e, const std::string& name, const py::object& array) {
             e.weights.put_vector(name, view_of("engine", name.c_str(), array, 0));
           })
      .def("put_table",
           [](Engine& e, const std::string& name, const py::object& array) {
             e.weights.put_table(name, view_of("engine", name.c_str(), array, 0));
           })
      .def("bind", [](Engine& e) { e.weights.bind(); })
      .def_property_readonly("matrices", [](const Engine& e) { return e.weights.matrices; })
      .def("generate_text", &generate_text, arg("prompts"), arg("image_ids"), arg("max_new_tokens"),
           arg("stop_ids"), arg("sampling"), arg("seeds"), arg("on_token") = py::none())
      .def("paint", &paint, arg("prompts"), arg("unconditional"), arg("seeds"), arg("guidance"),
           arg("sampling"), arg("rows"), arg("columns"), arg("on_patch") = py::none())
      .def("generate_interleaved", &generate_interleaved, arg("prompt"), arg("image_ids"),
           arg("unconditional"), arg("max_new_tokens"), arg("stop_ids"), arg("seed"),
           arg("guidance"), arg("text"), arg("image"), arg("on_progress") = py::none())
      .def(
          "states",
          [](Engine& e, const Ids& prompt, const py::object& image_ids) {
            Tensor keep;
            const Prompts one{{prompt}, pictures_of(image_ids, keep)};
            const py::object out =
                new_array("float32", {static_cast<int64_t>(prompt.size()), e.weights.sizes.dim});
            const Tensor to = view_of("engine", "out", out, 0, true);
            py::gil_scoped_release release;
            e.states(one, to.ptr<float>());
            return out;
          },
          arg("prompt"), arg("image_ids") = py::none())
      .def(
          "text_logits",
          [](Engine& e, const py::object& states) {
            const engine::Sizes& s = e.weights.sizes;
            const Tensor from = floats("states", states, s.dim);
            const py::object out = new_array("float32", {from.size(0), s.vocab + s.specials});
            const Tensor to = view_of("engine", "out", out, 0, true);
            py::gil_scoped_release release;
            e.text_logits(from.ptr<float>(), from.size(0), to.ptr<float>());
            return out;
          },
          arg("states"))
      .def(
          "head_logits",
          [](Engine& e, const py::object& states, const py::object& ids) {
            const engine::Sizes& s = e.weights.sizes;
            const Tensor from = floats("states", states, s.dim);
            const Tensor drawn = integers("ids", ids, "[N, window]", 2);
            check_shape("engine", "ids", drawn, "[N, window]", {from.size(0), s.window()});
            const py::object out = new_array("float32", {from.size(0), s.window(), s.codebook});
            const Tensor to = view_of("engine", "out", out, 0, true);
            py::gil_scoped_release release;
            e.head_logits(from.ptr<float>(), drawn.ptr<int64_t>(), from.size(0), to.ptr<float>());
            return out;
          },
          arg("states"), arg("ids"));
}

}  // namespace synergen::bind
