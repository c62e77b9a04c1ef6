#include "bind/array_op.h"

#include <cstring>

#include "bind/dlpack.h"

namespace synergen::bind {
namespace {

#ifdef SYNERGEN_SIMT
constexpr bool kEmulated = true;  // every array plays one on a GPU (csrc/simt/)
#else
constexpr bool kEmulated = false;
#endif

// Frees the Python side under the GIL, wherever the last view dies.
template <class T, class F>
std::shared_ptr<void> own(T* object, F release) {
  return std::shared_ptr<void>(object, [release](void* p) {
    py::gil_scoped_acquire gil;
    release(static_cast<T*>(p));
  });
}

Sizes contiguous_strides(const Sizes& sizes) {
  Sizes strides(sizes.size());
  int64_t step = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = step;
    step *= sizes[d];
  }
  return strides;
}

DType dtype_of_format(const char* format, int64_t itemsize) {
  if (!format) return DType::kUInt8;  // what a buffer without a format holds
  if (*format == '@' || *format == '=' || *format == '<') ++format;
  if (format[0] == 0 || format[1] != 0) return DType::kOther;
  switch (format[0]) {
    case 'd':
      return DType::kFloat64;
    case 'f':
      return DType::kFloat32;
    case 'e':
      return DType::kFloat16;
    case '?':
      return DType::kBool;
    case 'B':
      return DType::kUInt8;
    case 'b':
    case 'h':
    case 'i':
    case 'l':
    case 'q':
      return itemsize == 8   ? DType::kInt64
             : itemsize == 4 ? DType::kInt32
             : itemsize == 2 ? DType::kInt16
                             : DType::kInt8;
    default:
      return DType::kOther;
  }
}

Tensor view_of_buffer(const char* op, const char* name, const py::object& array, bool writable) {
  auto* buffer = new Py_buffer;
  const int flags = PyBUF_STRIDED_RO | PyBUF_FORMAT | (writable ? PyBUF_WRITABLE : 0);
  if (PyObject_GetBuffer(array.ptr(), buffer, flags) != 0) {
    delete buffer;
    PyErr_Clear();
    refuse(op, ": ", name, " must be a ", writable ? "writable " : "", "array of plain numbers");
  }
  Tensor view;
  view.owner = own(buffer, [](Py_buffer* b) {
    PyBuffer_Release(b);
    delete b;
  });
  view.dtype = dtype_of_format(buffer->format, buffer->itemsize);
  view.data = buffer->buf;
  for (int d = 0; d < buffer->ndim; ++d) {
    view.sizes.push_back(buffer->shape[d]);
    if (buffer->strides[d] % buffer->itemsize) {
      refuse(op, ": ", name, " must have strides that are whole elements, got ", buffer->strides[d],
             " bytes for ", buffer->itemsize, "-byte elements");
    }
    view.strides.push_back(buffer->strides[d] / buffer->itemsize);
  }
  return view;
}

DType dtype_of(const dlpack::DataType& t) {
  if (t.lanes != 1) return DType::kOther;
  const auto is = [&t](uint8_t code, uint8_t bits) { return t.code == code && t.bits == bits; };
  return is(dlpack::kFloat, 64)    ? DType::kFloat64
         : is(dlpack::kFloat, 32)  ? DType::kFloat32
         : is(dlpack::kFloat, 16)  ? DType::kFloat16
         : is(dlpack::kBfloat, 16) ? DType::kBFloat16
         : is(dlpack::kInt, 64)    ? DType::kInt64
         : is(dlpack::kInt, 32)    ? DType::kInt32
         : is(dlpack::kInt, 16)    ? DType::kInt16
         : is(dlpack::kInt, 8)     ? DType::kInt8
         : is(dlpack::kUInt, 8)    ? DType::kUInt8
         : is(dlpack::kBool, 8)    ? DType::kBool
                                   : DType::kOther;
}

Tensor view_of_dlpack(const char* op, const char* name, const py::object& array, int64_t stream,
                      bool writable) {
  py::dict options;
  const auto [type, id] = array.attr("__dlpack_device__")().cast<std::pair<int64_t, int64_t>>();
  // A CUDA producer makes its work visible to this stream; DLPack calls the default stream 1.
  if (type == dlpack::kCuda) options["stream"] = stream ? stream : 1;
  py::object capsule;
  try {
    capsule = array.attr("__dlpack__")(**options, py::arg("max_version") = py::make_tuple(1, 0));
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError))
      throw;  // a producer from before DLPack 1.0 knows no max_version
    capsule = array.attr("__dlpack__")(**options);
  }
  Tensor view;
  const dlpack::Array* from = nullptr;
  if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned")) {
    auto* managed = static_cast<dlpack::ManagedVersioned*>(
        PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned"));
    if (managed->major != 1)
      refuse(op, ": ", name, " must speak DLPack 1.x, got ", managed->major, ".", managed->minor);
    PyCapsule_SetName(capsule.ptr(), "used_dltensor_versioned");
    view.owner = own(managed, [](dlpack::ManagedVersioned* m) {
      if (m->deleter) m->deleter(m);
    });
    if (writable && (managed->flags & dlpack::kReadOnly))
      refuse(op, ": ", name, " must be writable");
    from = &managed->array;
  } else if (PyCapsule_IsValid(capsule.ptr(), "dltensor")) {
    auto* managed = static_cast<dlpack::Managed*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
    PyCapsule_SetName(capsule.ptr(), "used_dltensor");
    view.owner = own(managed, [](dlpack::Managed* m) {
      if (m->deleter) m->deleter(m);
    });
    from = &managed->array;
  } else {
    refuse(op, ": ", name, " must give a DLPack capsule that was not used before");
  }
  view.dtype = dtype_of(from->dtype);
  view.data = static_cast<char*>(from->data) + from->byte_offset;
  switch (from->device.type) {
    case dlpack::kCpu:
    case dlpack::kCudaHost:
      break;
    case dlpack::kCuda:
    case dlpack::kCudaManaged:
      view.device = {true, from->device.id};
      break;
    default:
      refuse(op, ": ", name, " must be on a CPU or a CUDA device, got DLPack device type ",
             from->device.type);
  }
  view.sizes.assign(from->shape, from->shape + from->ndim);
  if (from->strides) {
    view.strides.assign(from->strides, from->strides + from->ndim);
  } else {
    view.strides = contiguous_strides(view.sizes);
  }
  return view;
}

}  // namespace

Tensor view_of(const char* op, const char* name, const py::object& array, int64_t stream,
               bool writable) {
  Tensor view;
  if (PyObject_CheckBuffer(array.ptr())) {
    view = view_of_buffer(op, name, array, writable);
  } else if (py::hasattr(array, "__dlpack__")) {
    view = view_of_dlpack(op, name, array, stream, writable);
  } else {
    refuse(op, ": ", name, " must be an array with the buffer protocol or __dlpack__, got ",
           std::string(py::str(py::type::of(array).attr("__name__"))));
  }
  if (kEmulated) view.device = {true, 0};
  if (view.dim() > kMaxDims)
    refuse(op, ": ", name, " may have at most ", kMaxDims, " dimensions, got ", view.dim());
  return view;
}

ArrayCall::ArrayCall(const char* op, const Tensor& first, py::object out, int64_t stream_handle)
    : op_(op) {
  device = first.device;
  stream = reinterpret_cast<void*>(stream_handle);
#ifdef SYNERGEN_WITH_CUDA
  if (device.cuda) scope_.emplace(op, device.index);
#endif
  if (py::isinstance<py::tuple>(out) || py::isinstance<py::list>(out)) {
    for (py::handle each : out) given_.push_back(py::reinterpret_borrow<py::object>(each));
  } else if (!out.is_none()) {
    given_.push_back(std::move(out));
  }
}

// Called by host functions, which run without the GIL.
Tensor ArrayCall::empty(const char* name, const Sizes& sizes, DType dtype) {
  py::gil_scoped_acquire gil;
  if (!given_.empty()) {
    if (made_.size() == given_.size())
      refuse(op_, ": out must hold one array per result, got ", given_.size());
    const py::object& array = given_[made_.size()];
    Tensor view = view_of(op_, "out", array, reinterpret_cast<int64_t>(stream), true);
    if (view.dtype != dtype)
      refuse(op_, ": out for ", name, " must be ", name_of(dtype), ", got ", name_of(view.dtype));
    check_shape(op_, (std::string("out for ") + name).c_str(), view, name, sizes);
    check_same_device(op_, "out", view, *this);
    if (view.numel() > 1 && view.strides != contiguous_strides(sizes)) {
      refuse(op_, ": out for ", name, " must be contiguous, got strides ", to_string(view.strides));
    }
    made_.push_back(array);
    return view;
  }
  if (device.cuda && !kEmulated)
    refuse(op_, ": arrays on a CUDA device need out=, the array to write ", name, " to");
  if (dtype == DType::kBFloat16) {
    refuse(op_, ": NumPy has no bfloat16; pass out=, a bfloat16 array with __dlpack__ to write ",
           name, " to");
  }
  py::tuple shape(sizes.size());
  for (size_t d = 0; d < sizes.size(); ++d) shape[d] = py::int_(sizes[d]);
  py::object array = py::module_::import("numpy").attr("empty")(shape, name_of(dtype));
  made_.push_back(array);
  return view_of(op_, name, array, 0, true);
}

#ifdef SYNERGEN_WITH_CUDA
void* ArrayCall::scratch(int64_t bytes) {
  scratch_.push_back(cuda::allocate(op_, bytes, stream));
  return scratch_.back();
}

ArrayCall::~ArrayCall() {
  for (void* memory : scratch_) cuda::release(memory, stream);
}
#else
void* ArrayCall::scratch(int64_t) { refuse(op_, ": this build has no CUDA kernels"); }

ArrayCall::~ArrayCall() = default;
#endif

py::object ArrayCall::result() const {
  if (made_.size() == 1) return made_[0];
  py::tuple all(made_.size());
  for (size_t i = 0; i < made_.size(); ++i) all[i] = made_[i];
  return all;
}

}  // namespace synergen::bind
