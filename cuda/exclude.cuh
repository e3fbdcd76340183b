// Positions that take no part in a fit.
#pragma once

#include "launch.cuh"

namespace quantrature::cuda {

struct Excluded {
  const int64_t* row_offsets;
  const int32_t* columns;
  int64_t rows, cols;
};

// 1 in the place of every excluded weight. first_bad: the first row whose offsets or columns are not sound.
static __global__ void __launch_bounds__(256)
    mark_positions(Excluded at, uint8_t* mask, unsigned long long* first_bad) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * 256;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x; row < at.rows; row += step) {
    const int64_t begin = at.row_offsets[row], end = at.row_offsets[row + 1];
    bool sound = begin >= 0 && begin <= end && end <= at.row_offsets[at.rows] && (row > 0 || begin == 0);
    for (int64_t i = begin; sound && i < end; ++i) {
      sound = at.columns[i] >= 0 && at.columns[i] < at.cols;
      if (sound) mask[row * at.cols + at.columns[i]] = 1;
    }
    if (!sound) atomicMin(first_bad, static_cast<unsigned long long>(row));
  }
}

// Fills a mask of rows x cols. Waits for the stream; throws for positions that are not sound.
inline void mark_excluded(const Excluded& at, const char* op, Scratch<uint8_t>& mask, cudaStream_t stream) {
  Scratch<unsigned long long> first_bad(1, stream);
  mask.fill_bytes(0, at.rows * at.cols);
  first_bad.fill_bytes(0xFF, 1);
  launch(mark_positions, blocks_for(std::min<int64_t>(ceil_div(at.rows, 256), 1 << 16)), 256, 0, stream, at,
         mask.get(), first_bad.get());
  unsigned long long row = 0;
  first_bad.read(&row, 1);
  if (row != ~0ull)
    throw Refused(std::string("[") + op +
                  "] exclude must have row_offsets from 0 that ascend, and lie within w: got row=" +
                  std::to_string(row));
}

}  // namespace quantrature::cuda
