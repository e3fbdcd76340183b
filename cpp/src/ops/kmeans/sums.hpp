// What the kernels of kmeans.hpp are called with.
#pragma once

#include <cstdint>

#include "common/half.hpp"

namespace quantrature {

// Ends of clusters that kmeans_begins does at a time.
inline constexpr int64_t kKmeansEnds = 8;

// Of the numbers before each place, less those before the middle: their weights, weight x and weight x^2; and
// the least cost of dividing them. All have room for kKmeansEnds more, of any value.
struct KmeansSums {
  const double* weight;
  const double* first;
  const double* second;
  const double* best;
};

// The least cost of numbers [begin, end) in one cluster: the sum of weight (x - mean)^2; 0 where it is lost
// in the sums over far heavier numbers.
QUANTRATURE_INLINE double kmeans_cost(const KmeansSums& s, int64_t begin, int64_t end) {
  const double first = s.first[end] - s.first[begin];
  const double cost = s.second[end] - s.second[begin] - first * first / (s.weight[end] - s.weight[begin]);
  return cost > 0 ? cost : 0;
}

}  // namespace quantrature
