// Arguments that are arrays: anything that supports DLPack, never copied, converted or moved.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>

namespace lowbitcore::python {

namespace nb = nanobind;

class Array {
 public:
  Array() = default;
  explicit Array(nb::ndarray<> owner);

  // Looks at a tensor through the table of functions that its type offers (DLPack 1.2), which costs
  // a tenth of a call of __dlpack__. False where there is none.
  bool borrow(PyObject* tensor) noexcept;

  std::size_t ndim() const { return static_cast<std::size_t>(tensor_.ndim); }
  std::int64_t shape(std::size_t i) const { return tensor_.shape[i]; }
  // In elements.
  std::int64_t stride(std::size_t i) const;
  std::int64_t size() const;
  nb::dlpack::dtype dtype() const { return tensor_.dtype; }
  int device_type() const { return tensor_.device.device_type; }
  int device_id() const { return tensor_.device.device_id; }
  void* data() const { return static_cast<char*>(tensor_.data) + tensor_.byte_offset; }

 private:
  nb::dlpack::dltensor tensor_ = {};
  nb::ndarray<> owner_;  // empty where the caller's tensor is only looked at
};

}  // namespace lowbitcore::python

namespace nanobind::detail {

template <>
struct type_caster<lowbitcore::python::Array> {
  NB_TYPE_CASTER(lowbitcore::python::Array, const_name("Tensor"))

  bool from_python(handle source, std::uint32_t flags, cleanup_list* cleanup) noexcept {
    if (value.borrow(source.ptr())) return true;
    make_caster<ndarray<>> array;
    if (source.is_none() || !array.from_python(source, flags, cleanup)) return false;
    value = lowbitcore::python::Array(array.value);
    return true;
  }
};

}  // namespace nanobind::detail
