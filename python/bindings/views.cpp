#include "views.h"

#include <string>

#include "check.h"

namespace lowbitcore::python {

namespace {

using check::fail;

std::string dtype_name(nb::dlpack::dtype type) {
  const auto code = static_cast<nb::dlpack::dtype_code>(type.code);
  const std::string bits = std::to_string(type.bits);
  switch (code) {
    case nb::dlpack::dtype_code::Float:
      return "float" + bits;
    case nb::dlpack::dtype_code::Bfloat:
      return "bfloat" + bits;
    case nb::dlpack::dtype_code::Int:
      return "int" + bits;
    case nb::dlpack::dtype_code::UInt:
      return "uint" + bits;
    case nb::dlpack::dtype_code::Bool:
      return "bool";
    default:
      return "an unsupported type";
  }
}

void check_layout(const char* op, const char* argument, const Array& a) {
  if (a.ndim() == 0) fail(op, argument, "at least 1 dimension", "0");
  const std::size_t last = a.ndim() - 1;
  if (a.shape(last) > 1 && a.size() > 0 && a.stride(last) != 1) {
    fail(op, argument, "contiguous columns (stride 1)", "stride " + std::to_string(a.stride(last)));
  }
}

template <typename V>
V shaped(const char* op, const char* argument, const Array& a) {
  V v;
  v.rows = 1;
  v.cols = a.shape(a.ndim() - 1);
  v.stride = v.cols;
  for (std::size_t i = a.ndim() - 1; i-- > 0;) {
    if (a.shape(i) == 1) continue;
    if (v.rows == 1) {
      v.stride = a.stride(i);
    } else if (a.size() > 0 && a.stride(i) != v.stride * v.rows) {
      fail(op, argument, "leading dimensions that one step runs through",
           "stride " + std::to_string(a.stride(i)) + " in dimension " + std::to_string(i));
    }
    v.rows *= a.shape(i);
  }
  return v;
}

std::string device_name(Device device, int index) {
  return device == Device::cpu ? "the CPU" : "CUDA device " + std::to_string(index);
}

}  // namespace

Execution on_one_device(const char* op, std::uintptr_t stream,
                        std::initializer_list<Argument> arguments) {
  const Argument& first = *arguments.begin();
  const Device device = device_of(op, first.name, *first.array);
  for (const Argument& other : arguments) {
    if (other.array == nullptr) continue;
    const Device its = device_of(op, other.name, *other.array);
    if (its != device || other.array->device_id() != first.array->device_id()) {
      fail(op, other.name,
           "a tensor on " + device_name(device, first.array->device_id()) + ", as " + first.name,
           "one on " + device_name(its, other.array->device_id()));
    }
  }
  Execution exec;
  exec.device = device;
  exec.stream = reinterpret_cast<void*>(stream);
  return exec;
}

void on_cpu(const char* op, std::initializer_list<Argument> arguments) {
  for (const Argument& argument : arguments) {
    if (argument.array == nullptr) continue;
    if (argument.array->device_type() != nb::device::cpu::value) {
      fail(op, argument.name, "a tensor on the CPU", "one on another device");
    }
  }
}

DType dtype_of(const char* op, const char* argument, const Array& a) {
  if (a.dtype() == nb::dtype<float>()) return DType::f32;
  const auto code = static_cast<nb::dlpack::dtype_code>(a.dtype().code);
  if (a.dtype().bits == 16 && a.dtype().lanes == 1) {
    if (code == nb::dlpack::dtype_code::Bfloat) return DType::bf16;
    if (code == nb::dlpack::dtype_code::Float) return DType::f16;
  }
  fail(op, argument, "float32, bfloat16 or float16", dtype_name(a.dtype()));
}

ConstMatrix const_matrix(const char* op, const char* argument, const Array& a) {
  return matrix(op, argument, a);
}

Matrix matrix(const char* op, const char* argument, const Array& a) {
  check_layout(op, argument, a);
  Matrix m = shaped<Matrix>(op, argument, a);
  m.dtype = dtype_of(op, argument, a);
  m.data = a.data();
  return m;
}

template <typename T>
View<T> view(const char* op, const char* argument, const Array& a) {
  check_layout(op, argument, a);
  if (a.dtype() != nb::dtype<T>()) {
    fail(op, argument, dtype_name(nb::dtype<T>()), dtype_name(a.dtype()));
  }
  View<T> v = shaped<View<T>>(op, argument, a);
  v.data = static_cast<T*>(a.data());
  return v;
}

Heads heads(const char* op, const char* argument, const Array& a) {
  if (a.ndim() != 4) fail(op, argument, "4 dimensions", std::to_string(a.ndim()));
  check_layout(op, argument, a);
  return {a.data(),    dtype_of(op, argument, a),
          a.shape(0),  a.shape(1),
          a.shape(2),  a.shape(3),
          a.stride(0), a.stride(1),
          a.stride(2)};
}

template <typename T>
T* vector(const char* op, const char* argument, const Array& a, std::int64_t count) {
  const View<T> v = view<T>(op, argument, a);
  if (a.ndim() != 1 || v.cols != count) {
    fail(op, argument, std::to_string(count) + " elements in one dimension",
         std::to_string(a.size()) + " in " + std::to_string(a.ndim()));
  }
  return v.data;
}

template View<float> view(const char*, const char*, const Array&);
template View<std::int32_t> view(const char*, const char*, const Array&);
template View<std::int64_t> view(const char*, const char*, const Array&);
template View<std::uint8_t> view(const char*, const char*, const Array&);
template float* vector(const char*, const char*, const Array&, std::int64_t);
template std::int32_t* vector(const char*, const char*, const Array&, std::int64_t);
template std::uint8_t* vector(const char*, const char*, const Array&, std::int64_t);

}  // namespace lowbitcore::python
