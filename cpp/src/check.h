// Argument rules, written once for C++ and Python. Each throws std::invalid_argument with
// "op: argument: expected ..., got ...".
#pragma once

#include <lowbitcore/format.h>
#include <lowbitcore/types.h>

#include <string>

namespace lowbitcore::check {

[[noreturn]] void fail(const char* op, const char* argument, const std::string& expected,
                       const std::string& got);

// Something behind a pointer.
void data(const char* op, const char* argument, const void* pointer);

void bits(const char* op, int bits);
void format(const char* op, const QuantFormat& format, Device device = Device::cpu);

void shape(const char* op, const char* argument, const void* data, std::int64_t rows,
           std::int64_t cols, std::int64_t stride, std::int64_t expected_rows,
           std::int64_t expected_cols);

template <typename T>
void shape(const char* op, const char* argument, const View<T>& view, std::int64_t rows,
           std::int64_t cols) {
  shape(op, argument, view.data, view.rows, view.cols, view.stride, rows, cols);
}

// One of the types that there are.
void dtype(const char* op, const char* argument, DType dtype);

inline void shape(const char* op, const char* argument, const ConstMatrix& matrix,
                  std::int64_t rows, std::int64_t cols) {
  dtype(op, argument, matrix.dtype);
  shape(op, argument, matrix.data, matrix.rows, matrix.cols, matrix.stride, rows, cols);
}

void same_dtype(const char* op, const char* argument, DType got, const char* other, DType expected);

// A result in memory of its own: one that is written before all of an input is read.
void apart(const char* op, const char* argument, const ConstMatrix& result, const char* other,
           const ConstMatrix& input);

inline ConstMatrix as_matrix(const View<const float>& view) {
  return {view.data, DType::f32, view.rows, view.cols, view.stride};
}

// A number of rows, or a rank, of which sizes can be computed.
void row_count(const char* op, const char* argument, std::int64_t rows);

void columns(const char* op, const char* argument, std::int64_t cols);

// Rows that vectors run over: a positive multiple of 32 columns.
template <typename M>
void vectors(const char* op, const char* argument, const M& matrix) {
  columns(op, argument, matrix.cols);
  shape(op, argument, matrix, matrix.rows, matrix.cols);
}

// The shape and the type of another argument.
inline void like(const char* op, const char* argument, const ConstMatrix& matrix, const char* other,
                 const ConstMatrix& expected) {
  shape(op, argument, matrix, expected.rows, expected.cols);
  same_dtype(op, argument, matrix.dtype, other, expected.dtype);
}

// Columns of a head.
void head_columns(const char* op, const char* argument, std::int64_t cols);

// Heads of this shape.
void heads(const char* op, const char* argument, const ConstHeads& heads, std::int64_t batch,
           std::int64_t count, std::int64_t rows, std::int64_t cols);

// What scores are multiplied by.
void score_scale(const char* op, float scale);

// Every entry finite. Reads the matrix once.
void finite(const char* op, const char* argument, const char* expected, const ConstMatrix& matrix);

// Entries of g_idx in [0, groups).
void g_idx(const char* op, const std::int32_t* g_idx, const QuantFormat& format);

// The packed integers of a weight, where kernels can read or write them.
void packed(const char* op, const void* packed, Device device);

// A format, its packed integers, its g_idx (where its values can be seen) and optionally its
// scales.
void weight(const char* op, const QuantWeight& weight, bool with_scales, Device device);

// Error unless a call is to be computed on the CPU.
void on_cpu(const char* op, const Execution& exec);

// A permutation of 0 .. count - 1.
void permutation(const char* op, const char* argument, const std::int32_t* order,
                 std::int64_t count);

const char* name(DType dtype);

}  // namespace lowbitcore::check
