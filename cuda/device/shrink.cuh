// hqq's shrink(), with the same bits, in a tenth of its operations.
#pragma once

#include <cmath>
#include <limits>

#include "ops/grid/line.hpp"

namespace quantrature::cuda {

// What one iteration of hqq shrinks by.
struct Shrinking {
  float zero_up_to;  // magnitudes, and larger ones than in shrink(), whose result is 0
  double beta, inverse;
};

struct Shrinkings {
  Shrinking of[kHqqIterations];

  // Without shrinking, no magnitude is large enough.
  explicit Shrinkings(bool shrinks) {
    double beta = 10;
    for (Shrinking& s : of) {
      // |d|^-0.3 / beta is at least |d| where |d|^1.3 beta is at most 1; the margin covers all rounding.
      const double limit = std::pow(beta, -1 / 1.3) * (1 - 1e-5);
      s = {shrinks ? static_cast<float>(limit) : std::numeric_limits<float>::infinity(), beta, 1 / beta};
      beta *= 1.01;
    }
  }
};

// shrink(d, s.beta). One step of Newton's method from a guess of float32 gives |d|^-0.3 / beta and, by what
// the step was, a bound of its error. If both ends of the bound round to the same float32, so does what
// shrink() computes; otherwise, once in thousands of times, shrink() itself is called.
QUANTRATURE_INLINE float shrunk(float d, const Shrinking& s) {
  const float magnitude = std::abs(d);
  if (magnitude <= s.zero_up_to) return 0;
  const double x = static_cast<double>(magnitude), y = static_cast<double>(exp2f(-0.3f * log2f(magnitude)));
  const double y2 = y * y, y4 = y2 * y2;
  const double t = 1 - x * x * x * (y4 * y4 * y2);  // about ten times the error of y
  const double power = (y + y * t * 0.1) * s.inverse;
  const double error =
      power * (0.1 * t * t + 1e-14);  // the step leaves 0.055 t^2 for small t; rounding, 1e-15
  const float from = static_cast<float>(power - error), to = static_cast<float>(power + error);
  if (!(std::abs(t) < 1e-3 && from == to)) return shrink(d, s.beta);
  const float left = magnitude - from;
  return left > 0 ? std::copysign(left, d) : 0.0f;
}

}  // namespace quantrature::cuda
