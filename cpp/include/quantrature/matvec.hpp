// Products of a matrix on a packed grid, with outliers beside it, and one or a few vectors.
//
// With code, scale and zero as in grid.hpp (axis 1), for row i of the matrix and a vector x
//
//   y[i] = sum over j of (code[i, j] - zero) scale x[j]  +  sum over the residuals of row i of r x[column]
//
// where the residual of an outlier is what it adds to the value of the grid at its place, so that the outlier
// takes the place of that value. Numbers of 16 bits are widened first, and the results are float32.
//
// Numeric class B. Sums are of float32 and may be fused. Against the exact sum of the formula,
//
//   |error| <= 2^-23 (cols / 8 + 32) (sum of (code + |zero|) |scale x|  +  sum of |r x|)  +  2^-110 sum of
//   |scale|
//
// as long as no partial sum leaves float32. The same bits for every number of threads, and for a vector alone
// or among others.
#pragma once

#include "quantrature/types.hpp"

namespace quantrature {

using GridMatrix = qtr_grid_matrix;
using ResidualsArgs = qtr_residuals_args;
using MatvecArgs = qtr_matvec_args;

// out[k] is the value k of outliers minus what w has at its place, which is computed as dequantize does; the
// difference is rounded to float32 once. Numeric class E. Throws InvalidArgument for bits, group_size and
// sizes that do not go together, and for outliers that check_csr refuses or that have another shape than w.
QTR_API void residuals(const ResidualsArgs& args);

// Throws InvalidArgument for w as residuals does, for residuals of another shape than w, residuals or results
// that are not float32, and vectors and results of another length or number. That check_csr accepts the
// residuals is taken for granted: to look through them takes as long as to multiply.
QTR_API void matvec(const MatvecArgs& args);

}  // namespace quantrature
