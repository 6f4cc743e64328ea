// DLPack arrays as the core's views. Shapes are the core's business; types and devices are checked
// here, since a view no longer knows them.
#pragma once

#include <lowbitcore/lowbitcore.h>
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

namespace lowbitcore::python {

namespace nb = nanobind;

// Whatever supports DLPack, never copied, converted or moved.
using Array = nb::ndarray<>;

ConstMatrix const_matrix(const char* op, const char* argument, const Array& array);
Matrix matrix(const char* op, const char* argument, const Array& array);

// A view of T with one or two dimensions (one dimension is a single row).
template <typename T>
View<T> view(const char* op, const char* argument, const Array& array);

// The elements of a contiguous one-dimensional array of `count`.
template <typename T>
T* vector(const char* op, const char* argument, const Array& array, std::int64_t count);

}  // namespace lowbitcore::python
