// What the GPTQ kernel works on at a time: neighbouring columns of some rows, stored column after column.
#pragma once

#include <cstdint>

namespace quantrature {

inline constexpr int64_t kGptqRows = 32;    // of a piece
inline constexpr int64_t kGptqColumns = 8;  // of a piece, at most
inline constexpr int64_t kGptqStrip =
    2 * kGptqRows;  // rows of a task: a panel of A is read once for both pieces

struct GptqColumns {
  int count;
  int bits;
  float* sums;    // kGptqRows for each column: x less what columns of the piece add; becomes x - v
  float* errors;  // likewise, stride apart: w; becomes w - v
  int64_t stride;
  const float* feedback;  // A_jk of columns j and k of the piece at kGptqColumns j + k
  const float* inv[kGptqColumns];
  const float* zero[kGptqColumns];
  const float* scale[kGptqColumns];
  uint32_t exact[kGptqColumns];  // bit r: row r is excluded
  uint8_t* codes;                // kGptqRows for each column
};

}  // namespace quantrature
