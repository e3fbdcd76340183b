/// \defgroup kmeans Optimal k-means of each row
///
/// Finds the best k centroids of the numbers of each row, and the nearest centroid of each number.
///
/// For a row x with weights w, the centroids minimize the sum over j of w[j] times the squared distance of
/// x[j] to its nearest centroid. The result is the global minimum, not a local one. In one dimension, the
/// numbers of one centroid are neighbours in sorted order, so a dynamic program over the sorted distinct
/// numbers finds the minimum (Wang & Song 2011). When numbers are added at the end, the best start of the
/// last cluster never moves left; this saves most of the work. Sums are float64, of differences from the
/// middle number.
///
/// Centroids are the weighted means of their numbers, rounded to float32, ascending. Of equally good places
/// to divide the numbers, the lowest is taken. If a row has fewer than k distinct numbers of positive weight,
/// each of them is a centroid, and the largest is repeated. Numbers of weight 0 do not affect the centroids;
/// if all weights of a row are 0, they count as 1.
///
/// assignment is the index of the nearest centroid after rounding; of two equally near ones, the first.
/// Numbers and weights are float32, float16 or bfloat16; NaN and infinities are refused. Numeric class E: the
/// same bits on every CPU and for every number of threads.
#pragma once

#include "quantrature/types.hpp"

namespace quantrature {

/// \addtogroup kmeans
/// \{

/// Arguments of kmeans().
using KmeansArgs = qtr_kmeans_args;

/// Finds the centroids of each row. Throws InvalidArgument for an empty matrix or one of 2^31 - 1 or more
/// columns, k outside 1 to 256, weights that have another shape, are negative or not finite, numbers that are
/// not finite, and centroids of a wrong shape or dtype.
QTR_API void kmeans(const KmeansArgs& args);

/// \}

}  // namespace quantrature
