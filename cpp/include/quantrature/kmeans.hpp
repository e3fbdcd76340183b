/// \defgroup kmeans Centroids of the numbers of a row
///
/// The best k centroids for the numbers of each row, and which of them each number is nearest to.
///
/// For a row x with weights w, the centroids minimise the sum of w[j] times the squared distance of x[j] to
/// the nearest of them: the minimum over all choices, not a local one. In one dimension the numbers of a
/// centroid are neighbours when sorted, so that a dynamic program over the sorted distinct numbers finds it
/// (Wang & Song 2011); that its choices never move left as numbers are added saves most of the work. Sums are
/// of double, around the middle one of the numbers.
///
/// Centroids are the weighted means, rounded to float32, ascending; of equally good places to divide the
/// lowest is taken. If a row has fewer distinct numbers than k, counting those of positive weight, each of
/// them is a centroid and the largest is repeated. Numbers and weights are float32, float16 or bfloat16; NaN
/// and infinities are refused. Numbers of weight 0 have no say; a row of nothing but weights 0 is taken with
/// weights 1. assignment is the nearest centroid as given out, of two equally near ones the first. Numeric
/// class E: the same bits on every CPU and for every number of threads.
#pragma once

#include "quantrature/types.hpp"

namespace quantrature {

/// \addtogroup kmeans
/// \{

/// Arguments of kmeans().
using KmeansArgs = qtr_kmeans_args;

/// Finds the centroids of each row. Throws InvalidArgument for an empty matrix, k outside 1 to 256, weights
/// of another shape, negative or not finite, numbers that are not finite, and centroids of a wrong shape or
/// dtype.
QTR_API void kmeans(const KmeansArgs& args);

/// \}

}  // namespace quantrature
