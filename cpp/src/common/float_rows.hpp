// Rows of a matrix as float, whatever its dtype: the kernels see float32 alone.
#pragma once

#include <cstdint>

#include "quantrature/types.hpp"
#include "runtime/dispatch.hpp"

namespace quantrature {

inline int64_t element_size(DType dtype) {
  return dtype == QTR_F32 ? 4 : 2;
}

// Elements [begin, begin + n) of a row. Other dtypes than float32 are widened into buffer, which holds n
// floats.
inline const float* float_row(const Matrix& m, int64_t row, int64_t begin, int64_t n, float* buffer) {
  const int64_t offset = row * m.row_stride + begin;
  if (m.dtype == QTR_F32) return static_cast<const float*>(m.data) + offset;
  const uint16_t* bits = static_cast<const uint16_t*>(m.data) + offset;
  (m.dtype == QTR_F16 ? kernels().f16_to_f32 : kernels().bf16_to_f32)(bits, buffer, n);
  return buffer;
}

// Where to compute elements [begin, begin + n) of a row of m: in place for float32, else in buffer, which
// store_float_row then rounds to the nearest value of the dtype, ties to even.
inline float* float_row_target(const MutableMatrix& m, int64_t row, int64_t begin, float* buffer) {
  return m.dtype == QTR_F32 ? static_cast<float*>(m.data) + row * m.row_stride + begin : buffer;
}

inline void store_float_row(const MutableMatrix& m, int64_t row, int64_t begin, int64_t n,
                            const float* buffer) {
  if (m.dtype == QTR_F32) return;
  uint16_t* bits = static_cast<uint16_t*>(m.data) + row * m.row_stride + begin;
  (m.dtype == QTR_F16 ? kernels().f32_to_f16 : kernels().f32_to_bf16)(buffer, bits, n);
}

}  // namespace quantrature
