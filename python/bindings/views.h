// DLPack arrays as the core's views. Shapes are the core's business; types and devices are checked
// here, since a view no longer knows them.
#pragma once

#include <lowbitcore/lowbitcore.h>

#include "array.h"

namespace lowbitcore::python {

ConstMatrix const_matrix(const char* op, const char* argument, const Array& array);
Matrix matrix(const char* op, const char* argument, const Array& array);

// A view of T. One dimension is a single row; leading dimensions are rows, if one step leads from
// each to the next.
template <typename T>
View<T> view(const char* op, const char* argument, const Array& array);

// The elements of a contiguous one-dimensional array of `count`.
template <typename T>
T* vector(const char* op, const char* argument, const Array& array, std::int64_t count);

}  // namespace lowbitcore::python
