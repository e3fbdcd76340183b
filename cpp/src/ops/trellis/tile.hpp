// What the kernels of trellis.hpp are called with.
#pragma once

#include <cstdint>

#include "ops/trellis/reader.hpp"

namespace quantrature {

// A row of tiles and the vectors it is multiplied with.
struct TrellisRow {
  const uint8_t* streams;  // of all its tiles
  int64_t tiles;
  float factor;
  const float* x;  // vectors x (16 tiles)
  int64_t vectors;
  float* y;  // 16 results of the first vector
  int64_t y_stride;
};

}  // namespace quantrature
