// C++ names of the argument types that the C interface defines, and what holds for all ops.
//
// Matrices that an op reads are float32, float16 or bfloat16, each on its own, unless its header names
// dtypes; elements of 16 bits are widened to float32, which is exact. Every rounding, of results to 16 bits,
// too, is to nearest, ties to even. NaN and infinities pass through arithmetic as in IEEE 754 unless the
// header says that they are refused. Each header names the numeric class of its results:
//
//   E  exact: the same bits on every CPU, with every kernel set and for every number of threads
//   L  floating-point sums in a fixed order, element i in lane i mod 16, lanes added pairwise, chunks merged
//      in order: the same bits as well, beside a stated distance from the exact sum
//   B  within a stated bound of the exact result
#pragma once

#include "quantrature/c_api.h"

namespace quantrature {

using DType = qtr_dtype;
using Matrix = qtr_matrix;
using MutableMatrix = qtr_mutable_matrix;

}  // namespace quantrature
