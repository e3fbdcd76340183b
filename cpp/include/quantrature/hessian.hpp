/// \defgroup hessian Sums of x x^T
///
/// The sum over tokens of x x^T, which the error feedback of GPTQ (arXiv 2210.17323) and QTIP (2406.11235)
/// goes by: the Hessian, up to a factor, of the squared error of a linear layer's outputs.
///
/// ```text
/// sum[i][j] += sum over rows t of x[t][i] x[t][j]
/// ```
///
/// Products are added in float32, fused, in the order of the rows, from zero anew after every 256 of them;
/// each such sum is then added to what is there. So the error of an element is at most (256 + N / 256) 2^-24
/// times the sum of the absolute products, for N rows in all. A NaN or an infinity in column i of x makes row
/// and column i of the sum NaN or infinite. Class B: symmetric to the bit, the same for every number of
/// threads and every target that fuses.
#pragma once

#include "quantrature/types.hpp"

namespace quantrature {

/// \addtogroup hessian
/// \{

/// Arguments of hessian_accumulate().
using HessianAccumulateArgs = qtr_hessian_accumulate_args;

/// Adds the products of all rows of x to the sum. Throws InvalidArgument for a sum that is not float32 and
/// square with as many columns as x, and for an x that is empty.
QTR_API void hessian_accumulate(const HessianAccumulateArgs& args);

/// \}

}  // namespace quantrature
