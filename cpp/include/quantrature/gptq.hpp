/// \defgroup gptq GPTQ: codes that compensate the errors of earlier columns
///
/// Quantizes a matrix column by column on a grid. Each column compensates the errors of the columns before it
/// (GPTQ, arXiv 2210.17323; equal to LDLQ, arXiv 2307.13304). With the original weights w, the values v of
/// the codes and the Hessian H of the calibration text, the squared error of the layer's outputs is tr((w -
/// v) H (w - v)^T).
///
/// Columns are taken in their order, or with `ordered` by descending diagonal of H (of equal ones, the
/// first). R is upper triangular with R R^T = H + lambda I in this order, and A = R diag(R)^-1. Then
///
/// ```text
/// x_k  = w_k + sum over j < k of (w_j - v_j) A_jk        float32, fused, in the order of j
/// code = clamp(rint(x_k / scale + zero), 0, 2^bits - 1)   multiplied by the float32 1 / scale, not fused
/// v_k  = (code - zero) scale
/// ```
///
/// The scale and the zero of a column are those of its group in the matrix, whatever the order. If a scale is
/// 0, 0 is used for 1 / scale.
///
/// Fitted grids. With fitted_scale, scale and zero are not read. When the first column s of a group is
/// reached, its scale and zero are computed by the solver, as in grid.hpp, and with `half` rounded to
/// float16. They are fitted to the numbers y that best compensate all errors so far. In the paper's
/// formulation, which updates all later columns after each column, y is the content of the matrix at this
/// point:
///
/// ```text
/// y_k = w_k + sum over j < s of (w_j - v_j) A_jk + sum over s <= j < k of (w_j - y_j) A_jk
/// ```
///
/// With fitted grids, `ordered` keeps groups together: it takes groups by their largest diagonal element, and
/// the columns in a group by descending diagonal (arXiv 2505.14638).
///
/// w, scale and zero are float32, float16 or bfloat16; H is float32. NaN and infinities in any of them are
/// refused. If x_k is NaN because a sum overflows, its code is 0.
///
/// Excluded positions are stored exactly elsewhere: v = w there, so that they pass no error of their own on
/// to later columns. Their code is the code of w.
///
/// lambda is damp times the mean of the positive diagonal elements of H. R is computed in float64. If H +
/// lambda I is not positive definite, 2, 5, 10, 20, 50 and 100 times damp are tried. If all fail, A is the
/// identity, so that every weight gets the nearest code, and result.damp is infinite. A column whose diagonal
/// element is 0 gets the nearest codes, and passes no error on.
///
/// The caller can also compute the factor: A, the order and the squared diagonal of R are then read in place
/// of H. With fitted grids, the order must keep the columns of each group together. result.damp is then damp,
/// and result.dead is 0.
///
/// Numeric class B: the same bits for every number of threads and on every target that fuses multiplication
/// and addition (all but SSE2, SSSE3 and SSE4).
#pragma once

#include "quantrature/types.hpp"

namespace quantrature {

/// \addtogroup gptq
/// \{

/// Arguments of gptq().
using GptqArgs = qtr_gptq_args;
/// qtr_gptq_result under its C++ name.
using GptqResult = qtr_gptq_result;

/// Finds the codes of a matrix. Throws InvalidArgument for
/// - bits outside 1 to 8, and a group_size of 0 or below -1,
/// - sizes that do not fit together, and excluded positions outside the matrix,
/// - a damp that is negative or not finite,
/// - a NaN or infinity in w, H, scale or zero, and a negative number on the diagonal of H; the message names
///   the position,
/// - an order that does not name each column once, or with fitted grids does not keep groups together,
/// - with fitted grids, a solver other than minmax and mse, and a group whose range is not finite in float32.
QTR_API void gptq(const GptqArgs& args);

/// \}

}  // namespace quantrature
