// How the nearest entry of a table is found: by counting the bounds between entries that a number exceeds.
#pragma once

#include <bit>
#include <cstdint>

#include "common/half.hpp"

namespace quantrature {

struct CodebookSearch {
  const float* bounds;   // ascending: a number lies nearest to the entry whose rank is how many are below it
  int count;             // of the bounds
  const uint8_t* codes;  // of the entries by rank, count + 1 of them
  bool ranks_are_codes;
};

// The largest float32 that is not above the middle of a and b, a < b.
QUANTRATURE_INLINE float bound_between(float a, float b) {
  const double x = a, y = b, sum = x + y;
  const double part = sum - x, lost = (x - (sum - part)) + (y - part);  // sum + lost is exact
  const float bound = static_cast<float>(sum / 2);
  const double twice = 2 * static_cast<double>(bound);
  if (!(twice > sum || (twice == sum && lost < 0))) return bound;
  const uint32_t bits = std::bit_cast<uint32_t>(bound);  // the next float below
  return bound == 0 ? -std::bit_cast<float>(1u) : std::bit_cast<float>(bits >> 31 ? bits + 1 : bits - 1);
}

}  // namespace quantrature
