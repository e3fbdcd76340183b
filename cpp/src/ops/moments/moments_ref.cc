#include <algorithm>
#include <cmath>
#include <limits>

#include "runtime/reference.hpp"

namespace quantrature::reference {
namespace {

constexpr int kLanes = 16;

// Element i adds to lane i mod 16; then lanes 8 apart are added, then 4, 2 and 1 apart. Sums of this order
// come out the same whatever the width of the vectors that compute them.
double add_lanes(double (&lanes)[kLanes]) {
  for (int apart = kLanes / 2; apart > 0; apart /= 2)
    for (int i = 0; i < apart; ++i) lanes[i] += lanes[i + apart];
  return lanes[0];
}

Moments moments_of_chunk(const float* x, int64_t n) noexcept {
  Moments m{};
  m.count = static_cast<double>(n);
  m.minimum = std::numeric_limits<double>::infinity();
  m.maximum = -m.minimum;

  double sum[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) sum[i % kLanes] += static_cast<double>(x[i]);
  m.mean = add_lanes(sum) / m.count;

  double sum2[kLanes] = {}, sum3[kLanes] = {}, sum4[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) {
    const double d = static_cast<double>(x[i]) - m.mean;
    const double d2 = d * d;
    sum2[i % kLanes] += d2;
    sum3[i % kLanes] += d2 * d;
    sum4[i % kLanes] += d2 * d2;
    if (x[i] < m.minimum) m.minimum = static_cast<double>(x[i]);
    if (x[i] > m.maximum) m.maximum = static_cast<double>(x[i]);
  }
  m.m2 = add_lanes(sum2);
  m.m3 = add_lanes(sum3);
  m.m4 = add_lanes(sum4);
  m.minimum += 0.0;  // one sign of zero, whatever the order of the comparisons
  m.maximum += 0.0;
  return m;
}

void moments_of_columns(const float* x, int64_t rows, int64_t cols, Moments* out) noexcept {
  for (int64_t c = 0; c < cols; ++c) {
    Moments m{};
    m.count = static_cast<double>(rows);
    m.minimum = std::numeric_limits<double>::infinity();
    m.maximum = -m.minimum;
    for (int64_t r = 0; r < rows; ++r) m.mean += static_cast<double>(x[r * cols + c]);
    m.mean /= m.count;
    for (int64_t r = 0; r < rows; ++r) {
      const float value = x[r * cols + c];
      const double d = static_cast<double>(value) - m.mean;
      const double d2 = d * d;
      m.m2 += d2;
      m.m3 += d2 * d;
      m.m4 += d2 * d2;
      if (value < m.minimum) m.minimum = static_cast<double>(value);
      if (value > m.maximum) m.maximum = static_cast<double>(value);
    }
    m.minimum += 0.0;
    m.maximum += 0.0;
    out[c] = m;
  }
}

}  // namespace

void fill_moments(KernelTable& table) {
  table.moments_of_chunk = moments_of_chunk;
  table.moments_of_columns = moments_of_columns;
}

}  // namespace quantrature::reference
