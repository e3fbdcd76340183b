// What the packing kernels work on at a time.
#pragma once

#include <cstdint>

namespace quantrature {

// Codes [begin, end) of a row of cols codes. begin is a multiple of 256, and end too or it is cols: the span
// has whole blocks of each plane.
struct PackedSpan {
  int64_t begin;
  int64_t end;
  int64_t cols;
  int bits;
};

}  // namespace quantrature
