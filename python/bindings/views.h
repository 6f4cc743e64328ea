// DLPack arrays as the core's views. Shapes are the core's business; types and devices are checked
// here, since a view no longer knows them.
#pragma once

#include <lowbitcore/lowbitcore.h>

#include <cstdint>
#include <initializer_list>

#include "array.h"

namespace lowbitcore::python {

// An array under its name in error messages; null where it is optional and absent.
struct Argument {
  const char* name;
  const Array* array;
};

// Where an array lies, for the core (device.cpp).
Device device_of(const char* op, const char* argument, const Array& array);

// The device that all arrays share, the first of which is present, with its stream.
Execution on_one_device(const char* op, std::uintptr_t stream,
                        std::initializer_list<Argument> arguments);

// For operations that only the CPU has.
void on_cpu(const char* op, std::initializer_list<Argument> arguments);

// float32, bfloat16 or float16.
DType dtype_of(const char* op, const char* argument, const Array& array);

ConstMatrix const_matrix(const char* op, const char* argument, const Array& array);
Matrix matrix(const char* op, const char* argument, const Array& array);

// A view of T. One dimension is a single row; leading dimensions are rows, if one step leads from
// each to the next.
template <typename T>
View<T> view(const char* op, const char* argument, const Array& array);

// The same, to read.
template <typename T>
View<const T> input(const char* op, const char* argument, const Array& array) {
  const View<T> v = view<T>(op, argument, array);
  return {v.data, v.rows, v.cols, v.stride};
}

// [batch, heads, rows, cols], of any strides but the last.
Heads heads(const char* op, const char* argument, const Array& array);

// The elements of a contiguous one-dimensional array of `count`.
template <typename T>
T* vector(const char* op, const char* argument, const Array& array, std::int64_t count);

}  // namespace lowbitcore::python
