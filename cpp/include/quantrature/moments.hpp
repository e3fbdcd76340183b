/// \defgroup moments Mean, variance, kurtosis
///
/// Moments of a matrix: of all of it, of each row or column, or of groups along them.
///
/// For a set of n numbers, mean = sum(x) / n and m_p = sum((x - mean)^p) for p = 2, 3, 4. Each float32,
/// float16 or bfloat16 element is widened to double first. kurtosis is n * m4 / m2^2 (Pearson; a normal
/// distribution has 3).
///
/// Shapes: over the tensor one result; over rows one for each group of each row, row after row; over columns
/// one for each column of each group of rows, group after group. The last group may be shorter. A NaN or
/// infinity makes the mean and the sums NaN; minimum and maximum pass over NaN. Numeric class L: the same
/// bits on every CPU and for every number of threads. Error: each m_p is within about 1e-13 relative of the
/// exact value, whatever the mean, because the sums are taken around the mean of chunks of at most 4096
/// numbers and the chunks are merged (Pebay 2008, SAND2008-6212, eq. 2.1).
#pragma once

#include "quantrature/types.hpp"

namespace quantrature {

/// \addtogroup moments
/// \{

/// qtr_moments under its C++ name.
using Moments = qtr_moments;
/// Arguments of compute_moments().
using MomentsArgs = qtr_moments_args;

/// Computes the moments of each set. Throws InvalidArgument for an empty matrix, a group_size of 0 or below
/// -1, or a wrong out_count.
QTR_API void compute_moments(const MomentsArgs& args);

/// How many results compute_moments writes.
QTR_API int64_t moments_count(const MomentsArgs& args);

/// The moments of the union of two sets.
QTR_API Moments merge_moments(const Moments& a, const Moments& b);

/// Kurtosis as scipy.stats.kurtosis defines it: minus 3 when fisher, corrected for sample size when not bias.
/// NaN when the variance vanishes beside the mean, or when the correction needs more than 3 numbers and there
/// are fewer.
QTR_API double kurtosis(const Moments& moments, bool fisher, bool bias);

/// \}

}  // namespace quantrature
