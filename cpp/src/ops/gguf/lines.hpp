// What the kernels of the fit work on: a run of numbers, and sixteen lines at a time that may be its values.
#pragma once

#include <cstdint>

namespace quantrature {

constexpr int kGgufLines = 16;

// Up to 32 numbers. Their values lie on a line: value = scale code + offset, with codes from low to high.
struct GgufRun {
  const float* x;
  const float* weights;  // of their squared errors, 0 to 1
  int n;                 // a multiple of 16
  float low, high;
  const float* table;  // null; else its sixteen entries, ascending, take the place of the codes
};

struct GgufLines {
  float scale[kGgufLines];
  float offset[kGgufLines];
};

// What least squares may choose for the offset.
enum class GgufOffset { kNone, kAny, kNotAbove0 };

// Scales below this in magnitude count as 0.
constexpr float kGgufSmallestScale = 0x1p-60f;

// A system with a smaller determinant, over the product of its diagonal, is not solved.
constexpr float kGgufLeastDeterminant = 1e-5f;

}  // namespace quantrature
