/// \defgroup grid Quantization grids
///
/// Quantizes a matrix to codes of 1 to 8 bits, with a scale and a zero point for each group of weights.
///
/// Groups. On axis 1, each row is cut into groups of group_size numbers; the last group of a row may be
/// shorter. -1 makes each row one group. On axis 0, the matrix, which must have no gaps between rows, is
/// viewed as a matrix of group_size rows (-1: its own number of rows) and size / group_size columns, and each
/// column of this view is a group. group_size must divide the size. Codes are packed row by row
/// (packing.hpp): rows of the matrix on axis 1, rows of the view on axis 0. Scales and zeros are stored in
/// the order of the groups: row by row on axis 1, column by column of the view on axis 0.
///
/// w, and scales and zeros that are read, are float32, float16 or bfloat16. A NaN or an infinity in w is
/// refused. All arithmetic is float32; each operation is rounded, none is fused. With top = 2^bits - 1:
///
/// ```text
/// code  = clamp(rint(w inv + zero), 0, top)
/// value = (code - zero) scale, rounded to the dtype of the output
/// ```
///
/// lo and hi are the smallest and the largest number of a group. The solvers:
///
/// - minmax: inv = top / (hi - lo), zero = -(lo inv), scale = 1 / inv. With round_zero, the zero is rounded
///   to an integer.
/// - sym: with m = max(|lo|, |hi|): inv = top / (2 m), scale = 2 m / top, zero = 2^(bits-1), but 0.5 at 1
///   bit. The zero is not stored (the convention of GPTQ, arXiv 2210.17323).
/// - mse: as minmax or sym, with lo and hi, or m, times (100 - i) / 100 for i = 0 to 79. The i with the
///   smallest sum of (w - value)^2 is chosen; of equal ones, the first.
/// - hqq: the half-quadratic solver (Badri & Shaji 2023, p = 0.7). It starts as minmax with inv at most 20000
///   (the zero rounded with round_zero) and beta = 10. Up to 20 times, for all groups together, it computes:
///   ```text
///   q = clamp(rint(w inv + zero)), d = w - (q - zero) scale
///   e = sign(d) max(0, |d| - |d|^(p-1) / beta)
///   zero = mean over the group of q - (w - e) inv,  beta = 1.01 beta
///   ```
///   It stops after a step in which the mean of |d| over the matrix, rounded to float32, is not below the
///   mean of the step before (in the first step: not below 10^4). The zero of this last step is kept. Not
///   with sym.
/// - hqq-scale-free: as hqq, but without the limits of inv and of the first mean, and with e = 0. A matrix c
///   w therefore has the codes of w (for c a power of two; for any c up to rounding). It gives the result of
///   hqq if all |d| are at most 1/8 and no range is below top / 20000, which holds for most language models.
/// - given: scale and zero are read; inv = 1 / scale, or 0 if scale is 0.
///
/// With integer_zero, the zero is a code: lo is at most 0 and hi at least 0, and the zero is rounded to an
/// integer and clamped to 0 to top. (In hqq, the zero at the end.) With a scale_format, the scale is rounded
/// to it first (float16, bfloat16: to nearest, but never to 0; e8m0: to the next power of two, and lo and hi
/// are as with integer_zero), then inv = 1 / scale and zero = -(lo inv). Zeros that are not integers are
/// rounded to float16 or bfloat16, too. The codes are those of the rounded grid. Neither goes with given
/// grids, and integer_zero not with sym.
///
/// A group is constant if hi - lo (with sym: m) is below 2^-100; its inv is 0. Without sym, it has the codes
/// 0, the zero -1 and the scale lo; if lo is 0, or with integer_zero or e8m0, the zero 0 and the scale 1.
/// With sym, its values are 0, and its scale is 1, at 1 bit 0 (with e8m0: 2^-126).
///
/// Excluded positions, in CSR form, are not fitted. Each counts as the nearest number between the smallest
/// and the largest of the other numbers of its group (as 0 if there are none), and gets the code of this
/// number.
///
/// Sums over a group add element i to lane i mod 16, then add lanes that are 8, 4, 2 and 1 apart. Numeric
/// class E: codes, scales and zeros have the same bits on every CPU and for every number of threads.
#pragma once

#include "quantrature/types.hpp"

namespace quantrature {

/// \addtogroup grid
/// \{

/// qtr_grid_solver under its C++ name.
using GridSolver = qtr_grid_solver;
/// Arguments of quantize().
using QuantizeArgs = qtr_quantize_args;
/// Arguments of dequantize().
using DequantizeArgs = qtr_dequantize_args;
/// Arguments of round_to_half().
using RoundToHalfArgs = qtr_round_to_half_args;

/// Finds the codes of a matrix and, except with solver given, their scales and zeros.
///
/// Throws InvalidArgument for
/// - bits outside 1 to 8, an unknown solver, and an axis other than 0 and 1,
/// - a group_size that is 0 or below -1, or on axis 0 does not divide the size,
/// - gaps between rows on axis 0, wrong sizes of the outputs, and excluded positions outside the matrix,
/// - hqq, round_zero or integer_zero with sym, and round_zero, integer_zero or a scale_format with solver
/// given,
/// - a NaN or an infinity in w, and a group whose range (with sym: 2 m) is above the largest float32;
///   the message names the position.
QTR_API void quantize(const QuantizeArgs& args);

/// Computes the values of codes. Throws InvalidArgument for bits, group_size and axis as quantize() does, and
/// for sizes that do not fit together.
QTR_API void dequantize(const DequantizeArgs& args);

/// Rounds scales or zeros to float16, to nearest, ties to even. Also finds the smallest magnitude that is not
/// 0 (infinity if there is none) and the largest, which tell whether the numbers are in the range of float16.
/// Throws InvalidArgument for a count below 1 and null pointers.
QTR_API void round_to_half(const RoundToHalfArgs& args);

/// Returns the number of groups of a matrix.
QTR_API int64_t group_count(int64_t rows, int64_t cols, int64_t group_size, int axis);

/// \}

}  // namespace quantrature
