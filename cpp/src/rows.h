// Scratch that outlives the calls made while it is in use, as a Call's does not.
#pragma once

#include <lowbitcore/types.h>

#include <cstdint>
#include <memory>

namespace lowbitcore {

class Rows {
 public:
  Rows(DType dtype, std::int64_t rows, std::int64_t cols)
      : memory_(new char[static_cast<std::size_t>(rows * cols) * (dtype == DType::f32 ? 4 : 2) +
                         kAlignment]),
        matrix_{memory_.get() + kAlignment -
                    reinterpret_cast<std::uintptr_t>(memory_.get()) % kAlignment,
                dtype, rows, cols, cols} {}
  operator const Matrix&() const { return matrix_; }
  operator ConstMatrix() const { return matrix_; }

 private:
  // A cache line: many rows are read as they lie. Not asked of the C library, as glibc before 2.38
  // gives no freed memory to who wants it aligned.
  static constexpr std::size_t kAlignment = 64;

  std::unique_ptr<char[]> memory_;
  Matrix matrix_;
};

}  // namespace lowbitcore
