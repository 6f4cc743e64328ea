#include "array.h"

namespace lowbitcore::python {

namespace {

// The table as DLPack 1.2 lays it out, up to what is used here.
struct ExchangeApi {
  struct {
    std::uint32_t major, minor;
  } version;
  ExchangeApi* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object;
  void* managed_tensor_to_py_object;
  int (*dltensor_from_py_object)(void* object, nb::dlpack::dltensor* out);
};

const ExchangeApi* exchange_api(PyTypeObject* type) noexcept {
  PyObject* capsule =
      PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
  void* api = capsule == nullptr ? nullptr : PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
  if (api == nullptr) PyErr_Clear();
  Py_XDECREF(capsule);  // its type keeps the table
  return static_cast<const ExchangeApi*>(api);
}

}  // namespace

Array::Array(nb::ndarray<> owner) : owner_(std::move(owner)) {
  tensor_.data = owner_.data();
  tensor_.device = {owner_.device_type(), owner_.device_id()};
  tensor_.ndim = static_cast<std::int32_t>(owner_.ndim());
  tensor_.dtype = owner_.dtype();
  tensor_.shape = const_cast<std::int64_t*>(owner_.shape_ptr());
  tensor_.strides = const_cast<std::int64_t*>(owner_.stride_ptr());
}

bool Array::borrow(PyObject* tensor) noexcept {
  const ExchangeApi* api = exchange_api(Py_TYPE(tensor));
  if (api == nullptr || api->version.major != 1 || api->dltensor_from_py_object == nullptr) {
    return false;
  }
  if (api->dltensor_from_py_object(tensor, &tensor_) == 0) return true;
  PyErr_Clear();
  return false;
}

std::int64_t Array::stride(std::size_t i) const {
  if (tensor_.strides != nullptr) return tensor_.strides[i];
  std::int64_t step = 1;  // absent strides mean a compact array
  for (std::size_t j = ndim() - 1; j > i; --j) step *= shape(j);
  return step;
}

std::int64_t Array::size() const {
  std::int64_t count = 1;
  for (std::size_t i = 0; i < ndim(); ++i) count *= shape(i);
  return count;
}

}  // namespace lowbitcore::python
