/// \defgroup gptq Codes that make up for the errors of earlier columns
///
/// Codes on a given grid, found column after column, each of which makes up for the errors of those before it
/// (GPTQ, arXiv 2210.17323; the same as LDLQ, 2307.13304). The squared error of a layer's outputs on the text
/// that the Hessian H is of is tr((w - v) H (w - v)^T), v the values of the codes.
///
/// Columns are taken in their order, or with `ordered` by falling diagonal of H (of equals the first). With R
/// upper triangular, R R^T = H + lambda I in that order, and A = R diag(R)^-1:
///
/// ```text
/// x_k  = w_k + sum over j < k of (w_j - v_j) A_jk        float32, fused, in the order of j
/// code = clamp(rint(x_k / scale + zero), 0, 2^bits - 1)   multiplied by the float32 1 / scale, not fused
/// v_k  = (code - zero) scale
/// ```
///
/// The scale and zero of a column are those of its group in the matrix as it stands, whatever the order;
/// where a scale is 0, so is 1 / scale.
///
/// With fitted_scale no grid is given, and scale and zero are not read. That of a group is found when its
/// first column s is reached, with the solver, as in grid.hpp, and rounded to float16 with `half`. It is
/// fitted to the numbers that make up best for all errors by then, which are those that the paper's push form
/// has in the matrix at that point:
///
/// ```text
/// y_k = w_k + sum over j < s of (w_j - v_j) A_jk + sum over s <= j < k of (w_j - y_j) A_jk
/// ```
///
/// `ordered` then takes whole groups by their largest element of the diagonal, and the columns of a group by
/// falling diagonal (arXiv 2505.14638), so that groups stay those of the matrix.
///
/// w, scale and zero are float32, float16 or bfloat16, H is float32; NaN and infinities in any of them are
/// refused. A sum that overflows nonetheless, so that x_k is no number, gets code 0.
///
/// Excluded positions are kept exactly elsewhere: v = w there, and the columns after them make up for errors
/// before them alone. Their code is that of w.
///
/// lambda is damp times the mean of the diagonal of H over its positive elements. The factor is computed in
/// float64. If there is none, damp is tried 2, 5, 10, 20, 50 and 100 times as large; if there is none still,
/// A is the unit matrix: every weight gets the nearest code, and result.damp is infinite. Columns whose
/// diagonal element is 0 get the nearest code and pass no error on.
///
/// The caller can give the factor instead: A, the order, in which the columns of a group follow each other
/// where grids are fitted, and the squared diagonal of R. Then result.damp is damp, and result.dead is 0.
///
/// Class B: the same bits for every number of threads and on every target that fuses multiplication and
/// addition (all but SSE2, SSSE3 and SSE4).
#pragma once

#include "quantrature/types.hpp"

namespace quantrature {

/// \addtogroup gptq
/// \{

/// Arguments of gptq().
using GptqArgs = qtr_gptq_args;
/// qtr_gptq_result under its C++ name.
using GptqResult = qtr_gptq_result;

/// Finds the codes of a matrix. Throws InvalidArgument for bits outside 1 to 8, a group_size of 0 or below
/// -1, sizes that do not go together, a damp that is negative or not finite, excluded positions outside the
/// matrix, and a NaN or infinity in w, H, scale or zero or a negative number on its diagonal, naming the
/// position; for fitted grids also another solver than minmax and mse, and a group whose range is not finite
/// in float32.
QTR_API void gptq(const GptqArgs& args);

/// \}

}  // namespace quantrature
