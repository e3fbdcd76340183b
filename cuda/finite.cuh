// Which number of a matrix is not finite, for a refusal.
#pragma once

#include <bit>

#include "device/elements.cuh"
#include "launch.cuh"

namespace quantrature::cuda {

QUANTRATURE_INLINE bool is_finite(float x) {
  return (std::bit_cast<uint32_t>(x) & 0x7F800000u) != 0x7F800000u;
}

static __global__ void __launch_bounds__(256) find_not_finite(qtr_matrix w, unsigned long long* first) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * 256;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x; i < w.rows * w.cols; i += step)
    if (!is_finite(load(w.data, w.dtype, i / w.cols * w.row_stride + i % w.cols)))
      atomicMin(first, static_cast<unsigned long long>(i));
}

// As messages have it. Waits for the stream.
inline std::string number_at(const qtr_matrix& m, int64_t row, int64_t col, cudaStream_t stream) {
  uint32_t bits = 0;
  const int64_t size = bytes_of(m.dtype);
  expect(cudaMemcpyAsync(&bits, static_cast<const char*>(m.data) + (row * m.row_stride + col) * size,
                         static_cast<size_t>(size), cudaMemcpyDeviceToHost, stream),
         "reading a number");
  expect(cudaStreamSynchronize(stream), "waiting for the device");
  char value[32];
  std::snprintf(value, sizeof(value), "%g", static_cast<double>(load(&bits, m.dtype, 0)));
  return value;
}

// The place of the first number that is not finite, rows one after the other; -1 where all are. Waits for the
// stream.
inline int64_t first_not_finite(const qtr_matrix& w, cudaStream_t stream) {
  Scratch<unsigned long long> first(1, stream);
  first.fill_bytes(0xFF, 1);
  launch(find_not_finite, blocks_for(std::min<int64_t>(ceil_div(w.rows * w.cols, 256), 1 << 16)), 256, 0,
         stream, w, first.get());
  unsigned long long at = 0;
  first.read(&at, 1);
  return static_cast<int64_t>(at);
}

// Refuses the number at a place, by a rule that it breaks.
[[noreturn]] inline void refuse_number(const qtr_matrix& m, int64_t at, const std::string& rule,
                                       const char* number, const char* column, cudaStream_t stream) {
  const int64_t row = at / m.cols, col = at % m.cols;
  throw Refused(rule + ": got " + number + "=" + number_at(m, row, col, stream) +
                ", row=" + std::to_string(row) + ", " + column + "=" + std::to_string(col));
}

// Names the first number that is not finite; returns where all are.
inline void refuse_not_finite(const qtr_matrix& w, const char* op, const char* name, cudaStream_t stream,
                              const char* column = "col") {
  const int64_t at = first_not_finite(w, stream);
  if (at >= 0)
    refuse_number(w, at, std::string("[") + op + "] " + name + " must be finite", "value", column, stream);
}

}  // namespace quantrature::cuda
