// The grid of one group, found by half a warp, whose 16 threads are the 16 lanes of the reference. Both
// halves of a warp go through the same steps, whatever their groups are.
#pragma once

#include <bit>
#include <cmath>
#include <limits>

#include "finite.cuh"
#include "launch.cuh"
#include "ops/grid/line.hpp"

namespace quantrature::cuda {

constexpr int kLanes = 16;
constexpr unsigned kAll = 0xffffffffu;

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

// A code in the mantissa of a float from 2^23 on. There a float has no fraction, so that the sum rounds, and
// to clamp before it comes to the same: the limits are integers.
constexpr float kCodeOffset = 8388608.0f;
__device__ __forceinline__ float code_with_offset(float x, float inv, float zero, float top) {
  return fminf(fmaxf(x * inv + zero, 0.0f), top) + kCodeOffset;
}

__device__ __forceinline__ float code_of(float x, float inv, float zero, float top) {
  return code_with_offset(x, inv, zero, top) - kCodeOffset;
}

// The numbers of a group that a lane has: every 16th of those that at(i) gives. kEach is how many, where that
// is known when a kernel is compiled, as it is for groups of 16, 32, 64 and 128: then they stay in registers.
// 0: they are read whenever they are needed.
template <int kEach, class At>
struct Numbers {
  float own[kEach];

  __device__ Numbers(const At& at, int64_t, int lane) {
#pragma unroll
    for (int k = 0; k < kEach; ++k) own[k] = at(lane + k * kLanes);
  }
  template <class Body>
  __device__ __forceinline__ void each(const Body& body) const {
#pragma unroll
    for (int k = 0; k < kEach; ++k) body(own[k]);
  }
};

template <class At>
struct Numbers<0, At> {
  const At& at;
  int64_t n;
  int lane;

  __device__ Numbers(const At& reader, int64_t length, int own_lane)
      : at(reader), n(length), lane(own_lane) {}
  template <class Body>
  __device__ __forceinline__ void each(const Body& body) const {
    for (int64_t i = lane; i < n; i += kLanes) body(at(i));
  }
};

// The range of a group, in all its lanes.
template <class Numbers>
__device__ Range range_of(const Numbers& numbers) {
  float low = std::numeric_limits<float>::infinity(), high = -low;
  float bad = 0;
  numbers.each([&](float v) {
    if (!is_finite(v)) bad = -1;
    low = v < low ? v : low;
    high = v > high ? v : high;
  });
  low = least_of_lanes(low);
  high = -least_of_lanes(-high);
  bad = least_of_lanes(bad);
  return {low, high, bad == 0};
}

// Sums over the lanes of a group of one value for each lane; lane l gets the l-th sum. Half the values go to
// the other half of the lanes, and so on: the lanes are added pairwise in the order of the reference.
template <int kApart = kLanes / 2>
__device__ __forceinline__ float add_lanes_of_each(float (&values)[kLanes], int lane) {
  const bool upper = (lane & kApart) != 0;
#pragma unroll
  for (int k = 0; k < kApart; ++k) {
    const float sent = upper ? values[k] : values[k + kApart], kept = upper ? values[k + kApart] : values[k];
    values[k] = kept + __shfl_xor_sync(kAll, sent, kApart);
  }
  if constexpr (kApart > 1) return add_lanes_of_each<kApart / 2>(values, lane);
  return values[0];
}

__device__ __forceinline__ float squared_error(float x, const GridLine& line, float top) {
  const float apart = x - (code_of(x, line.inv, line.zero, top) - line.zero) * line.scale;
  return apart * apart;
}

// The best of the shrunk ranges; of equally good ones, the widest. Every lane has the line of one candidate
// at a time, and all lanes add the errors of their numbers on all 16. The errors of the two extremes are
// known before; in whatever order errors are added and rounded, the sum of all is no less than theirs. If
// that is too much already, for all 16, they are passed over.
template <class Numbers>
__device__ GridLine least_squared_error(const Numbers& numbers, float low, float high, const GridRule& rule,
                                        int lane) {
  static_assert(kMseCandidates % kLanes == 0);
  const float top = top_code(rule.bits);
  GridLine best{};
  float least = 0;
  int which = 0;
#pragma unroll 1
  for (int first = 0; first < kMseCandidates; first += kLanes) {
    const float factor = shrink_factor(first + lane);
    const GridLine line = line_of_range(low * factor, high * factor, rule);
    const float at_least =
        squared_error(low, line, top) + (low == high ? 0.0f : squared_error(high, line, top));
    if (first > 0 && !__any_sync(kAll, at_least < least_of_lanes(least))) continue;
    float errors[kLanes], inv[kLanes], zero[kLanes], scale[kLanes];
#pragma unroll
    for (int c = 0; c < kLanes; ++c) {
      errors[c] = 0;
      inv[c] = __shfl_sync(kAll, line.inv, c, kLanes);
      zero[c] = __shfl_sync(kAll, line.zero, c, kLanes);
      scale[c] = __shfl_sync(kAll, line.scale, c, kLanes);
    }
    numbers.each([&](float x) {
#pragma unroll
      for (int c = 0; c < kLanes; ++c) {
        errors[c] += squared_error(x, {inv[c], zero[c], scale[c]}, top);
      }
    });
    const float error = add_lanes_of_each(errors, lane);
    if (first == 0 || error < least) best = line, least = error, which = first + lane;
  }
#pragma unroll
  for (int apart = kLanes / 2; apart > 0; apart /= 2) {
    const float other = __shfl_xor_sync(kAll, least, apart, kLanes);
    const int its = __shfl_xor_sync(kAll, which, apart, kLanes);
    if (other < least || (other == least && its < which)) least = other, which = its;
  }
  const int from = which % kLanes;
  return {__shfl_sync(kAll, best.inv, from, kLanes), __shfl_sync(kAll, best.zero, from, kLanes),
          __shfl_sync(kAll, best.scale, from, kLanes)};
}

struct Fitted {
  GridLine line;
  bool good;  // the numbers and their range are finite
};

// By minmax or mse.
template <class Numbers>
__device__ Fitted fitted_line(const Numbers& numbers, const GridRule& rule, int lane) {
  const auto [low, high, finite] = range_of(numbers);
  GridLine best = line_of_range(low, high, rule);
  if (rule.mse) {
    const GridLine found = least_squared_error(numbers, low, high, rule, lane);
    if (best.inv != 0) best = found;  // not of a constant group
  }
  return {best, finite && range_is_finite(low, high, rule.sym)};
}

}  // namespace quantrature::cuda
