/// \defgroup topk Exact selection of the largest elements
///
/// Exact selection of the k largest elements, by absolute value or by value, of one matrix, of several
/// together, or of each row.
///
/// Elements are float32, float16 or bfloat16 and compared as the numbers they are: 0 and -0 are equal. Of
/// equal elements those with the lower index are taken first, those of an earlier matrix before those of a
/// later one. Indices come out ascending. NaN has no place in the order and is refused, with the position of
/// the first one; with k = 0 nothing is read. Numeric class E.
///
/// Elements that may be among the k are gathered in one pass over the data, above a lower bound taken from a
/// sample, and the rest is done among them; where that fails, because the bound was too high or many elements
/// are equal, the k-th largest is found digit by digit instead. Memory beside the outputs: 24 bytes an
/// element of k or 1 MiB, and half a percent of the data.
#pragma once

#include "quantrature/types.hpp"

namespace quantrature {

/// \addtogroup topk
/// \{

/// Arguments of topk().
using TopkArgs = qtr_topk_args;

/// Selects the largest elements. Throws InvalidArgument for empty matrices, matrices of different dtypes, a k
/// below 0 or larger than what there is, more than one matrix with per_row, or a NaN.
QTR_API void topk(const TopkArgs& args);

/// \}

}  // namespace quantrature
