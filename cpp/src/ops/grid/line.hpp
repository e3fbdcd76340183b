// The line code = w inv + zero of one group, from its extremes. Shared by the reference and the fast kernels.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "common/half.hpp"
#include "quantrature/c_api.h"

namespace quantrature {

inline constexpr int kHqqIterations = 20;
inline constexpr int kMseCandidates = 80;

struct GridRule {
  int bits;
  bool sym;
  bool round_zero;
  bool mse;
  float max_inv;  // infinity but for hqq
  bool shrinks;   // whether hqq takes large errors for outliers
  bool integer_zero;
  qtr_scale_format scale_format;

  // Then a group has the range from the least to the largest of its numbers and 0.
  QUANTRATURE_INLINE bool has_zero() const { return integer_zero || scale_format == QTR_SCALE_E8M0; }
  QUANTRATURE_INLINE bool is_plain() const { return !has_zero() && scale_format == QTR_SCALE_F32; }
};

// One number of each for every group.
struct GridLines {
  float* inv;  // 0 for a constant group
  float* zero;
  float* scale;
};

struct GridLine {
  float inv;
  float zero;
  float scale;
};

inline bool is_hqq(qtr_grid_solver solver) {
  return solver == QTR_HQQ || solver == QTR_HQQ_SCALE_FREE;
}

inline GridRule rule_of(const qtr_quantize_args& a) {
  const bool published = a.solver == QTR_HQQ;
  return {a.bits,
          a.sym != 0,
          a.round_zero != 0,
          a.solver == QTR_MSE,
          published ? 2e4f : std::numeric_limits<float>::infinity(),
          published,
          a.integer_zero != 0,
          a.scale_format};
}

// Below which the mean error of the first iteration of hqq has to be for a second one.
inline float first_limit(qtr_grid_solver solver) {
  return solver == QTR_HQQ ? 1e4f : std::numeric_limits<float>::infinity();
}

QUANTRATURE_INLINE float top_code(int bits) {
  return static_cast<float>((1 << bits) - 1);
}

// 2^(bits-1); at 1 bit 0.5, the middle between the codes.
QUANTRATURE_INLINE float symmetric_zero(int bits) {
  return bits == 1 ? 0.5f : static_cast<float>(1 << (bits - 1));
}

// Whether the grid between these extremes exists.
QUANTRATURE_INLINE bool range_is_finite(float lo, float hi, bool sym) {
  const float range = sym ? 2 * std::max(std::abs(lo), std::abs(hi)) : hi - lo;
  return range <= 3.40282347e38f;
}

// The least power of two that is no less than x > 0.
QUANTRATURE_INLINE float power_of_two_from(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), exponent = bits & 0x7F800000;
  return std::bit_cast<float>(std::min(bits == exponent ? exponent : exponent + 0x00800000, 0x7F000000u));
}

// The number of the format that stands for x: the nearest, or, for powers of two, the next.
QUANTRATURE_INLINE float in_scale_format(float x, qtr_scale_format format) {
  if (format == QTR_SCALE_F16) return f32_from_f16(f16_from_f32(x));
  if (format == QTR_SCALE_BF16) return f32_from_bf16(bf16_from_f32(x));
  return format == QTR_SCALE_E8M0 ? power_of_two_from(x) : x;
}

// The scale of a group that is not constant: never 0.
QUANTRATURE_INLINE float stored_scale(float scale, qtr_scale_format format) {
  const float rounded = in_scale_format(scale, format);
  return rounded == 0 ? 0x1p-24f : rounded;
}

// A zero as it is stored. Zeros are stored with the precision of scales; powers of two go with integers.
QUANTRATURE_INLINE float stored_zero(float zero, const GridRule& rule) {
  if (rule.integer_zero) return std::min(std::max(std::nearbyint(zero), 0.0f), top_code(rule.bits));
  return rule.scale_format == QTR_SCALE_E8M0 ? zero : in_scale_format(zero, rule.scale_format);
}

QUANTRATURE_INLINE GridLine line_of_range(float lo, float hi, const GridRule& rule) {
  constexpr float kSmallest = 0x1p-100f;
  const float top = top_code(rule.bits);
  if (rule.sym) {
    const float zero = symmetric_zero(rule.bits);
    const float m = std::max(std::abs(lo), std::abs(hi));
    const float least = rule.scale_format == QTR_SCALE_E8M0 ? 0x1p-126f : 0.0f;
    if (m < kSmallest) return {0, zero, rule.bits == 1 ? least : 1.0f};
    if (rule.is_plain()) return {top / (2 * m), zero, 2 * m / top};
    const float scale = stored_scale(2 * m / top, rule.scale_format);
    return {1 / scale, zero, scale};
  }
  if (rule.has_zero()) lo = std::min(lo, 0.0f), hi = std::max(hi, 0.0f);
  lo += 0.0f;  // one sign of zero, whatever the order of the comparisons
  if (hi - lo < kSmallest)
    return lo == 0 || rule.has_zero() ? GridLine{0, 0, 1}
                                      : GridLine{0, -1, in_scale_format(lo, rule.scale_format)};
  const float inv = std::min(top / (hi - lo), rule.max_inv);
  if (rule.is_plain()) {
    const float zero = 0 - lo * inv;
    return {inv, rule.round_zero ? std::nearbyint(zero) : zero, 1 / inv};
  }
  const float scale = stored_scale(1 / inv, rule.scale_format), zero = 0 - lo * (1 / scale);
  return {1 / scale, stored_zero(rule.round_zero ? std::nearbyint(zero) : zero, rule), scale};
}

QUANTRATURE_INLINE GridLine given_line(float scale, float zero) {
  return {scale == 0 ? 0.0f : 1 / scale, zero, scale};
}

// The factor of candidate i of the mse solver.
QUANTRATURE_INLINE float shrink_factor(int i) {
  return static_cast<float>(100 - i) / 100.0f;
}

// x^-0.3 for a float x > 0, by additions, multiplications and divisions alone, so that it has the same bits
// everywhere: Newton's method for the tenth root y of x^-3. The first guess, linear in the bits of x, is
// within 12 % and the error e of a step leaves 5.5 e^2 of it: seven steps are more than enough.
QUANTRATURE_INLINE double power_minus_0_3(double x) {
  const int64_t one = std::bit_cast<int64_t>(1.0);
  double y = std::bit_cast<double>(one - (std::bit_cast<int64_t>(x) - one) * 3 / 10);
  const double cube = x * x * x;
  for (int i = 0; i < 7; ++i) {
    const double y2 = y * y, y4 = y2 * y2;
    y = y * (11 - cube * (y4 * y4 * y2)) / 10;
  }
  return y;
}

// Below this |d| shrink(d) is 0 in all iterations: it needs |d|^1.3 > 1 / beta, and beta stays below 12.1.
inline constexpr float kShrinksToZero = 0.125f;

// sign(d) max(0, |d| - |d|^-0.3 / beta)
QUANTRATURE_INLINE float shrink(float d, double beta) {
  const float magnitude = std::abs(d);
  if (magnitude <= kShrinksToZero) return 0;
  const float left = magnitude - static_cast<float>(power_minus_0_3(static_cast<double>(magnitude)) / beta);
  return left > 0 ? std::copysign(left, d) : 0.0f;
}

// Where the half-quadratic solver stops: at the first iteration that does not lower the mean error. errors:
// its sum over all numbers, of each iteration; least: that the first must be below.
inline int64_t last_iteration(const double (&errors)[kHqqIterations], double size, float least) {
  for (int64_t i = 0; i < kHqqIterations; ++i) {
    const float error = static_cast<float>(errors[i] / size);
    if (!(error < least)) return i;
    least = error;
  }
  return kHqqIterations - 1;
}

}  // namespace quantrature
