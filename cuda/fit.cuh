// The grid of one group, found by half a warp, whose 16 threads are the 16 lanes of the reference. Both
// halves of a warp go through the same steps, whatever their groups are.
#pragma once

#include <cmath>
#include <limits>

#include "finite.cuh"
#include "launch.cuh"
#include "ops/grid/line.hpp"

namespace quantrature::cuda {

constexpr int kLanes = 16;
constexpr unsigned kAll = 0xffffffffu;

__device__ inline float add_lanes(float x) {
  for (int apart = kLanes / 2; apart > 0; apart /= 2)
    x += __shfl_down_sync(kAll, x, static_cast<unsigned>(apart), kLanes);
  return __shfl_sync(kAll, x, 0, kLanes);
}

__device__ inline float least_of_lanes(float x) {
  for (int apart = kLanes / 2; apart > 0; apart /= 2) {
    const float other = __shfl_xor_sync(kAll, x, apart, kLanes);
    x = other < x ? other : x;
  }
  return x;
}

struct Range {
  float low, high;
  bool finite;  // all numbers are
};

// Of n numbers, which the lanes of a group share.
template <class At>
__device__ Range range_of(int64_t n, int lane, const At& at) {
  float low = std::numeric_limits<float>::infinity(), high = -low;
  float bad = 0;
  for (int64_t i = lane; i < n; i += kLanes) {
    const float v = at(i);
    if (!is_finite(v)) bad = -1;
    low = v < low ? v : low;
    high = v > high ? v : high;
  }
  low = least_of_lanes(low);
  high = -least_of_lanes(-high);
  bad = least_of_lanes(bad);
  return {low, high, bad == 0};
}

__device__ inline float code_of(float x, float inv, float zero, float top) {
  const float code = std::nearbyint(x * inv + zero);
  return code < 0.0f ? 0.0f : code > top ? top : code;
}

template <class At>
__device__ float squared_error(int64_t n, int lane, const GridLine& line, float top, const At& at) {
  float sum = 0;
  for (int64_t i = lane; i < n; i += kLanes) {
    const float x = at(i);
    const float apart = x - (code_of(x, line.inv, line.zero, top) - line.zero) * line.scale;
    sum += apart * apart;
  }
  return add_lanes(sum);
}

struct Fitted {
  GridLine line;
  bool good;  // the numbers and their range are finite
};

// By minmax or mse, to n numbers.
template <class At>
__device__ Fitted fitted_line(int64_t n, int lane, const GridRule& rule, const At& at) {
  const auto [low, high, finite] = range_of(n, lane, at);
  const float top = top_code(rule.bits);
  GridLine best = line_of_range(low, high, rule);
  if (rule.mse) {
    float least = squared_error(n, lane, best, top, at);
    const bool constant = best.inv == 0;
    for (int i = 1; i < kMseCandidates; ++i) {
      const GridLine line = line_of_range(low * shrink_factor(i), high * shrink_factor(i), rule);
      const float error = squared_error(n, lane, line, top, at);
      if (!constant && error < least) best = line, least = error;
    }
  }
  return {best, finite && range_is_finite(low, high, rule.sym)};
}

}  // namespace quantrature::cuda
