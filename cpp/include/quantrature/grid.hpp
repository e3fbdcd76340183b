/// \defgroup grid Quantization grids
///
/// Quantization grids: codes of 1 to 8 bits, and for each group of weights a scale and a zero point.
///
/// Groups. On axis 1 each row is cut into groups of group_size numbers, the last one possibly shorter; -1
/// makes each row one group. On axis 0 the matrix, without gaps between its rows, is read as one of
/// group_size rows (-1: its own rows) and size / group_size columns, and each column of that view is a group;
/// group_size must divide the size. Codes are packed row by row of the matrix on axis 1, of the view on axis
/// 0 (packing.hpp). Scales and zeros are stored row after row, on axis 0 column after column of the view.
///
/// w, and the scales and zeros that are read, are float32, float16 or bfloat16; a NaN or an infinity in w is
/// refused. All arithmetic is float32, each operation rounded, none fused. With top = 2^bits - 1:
///
/// ```text
/// code  = clamp(rint(w inv + zero), 0, top)
/// value = (code - zero) scale, rounded to the dtype of the output
/// ```
///
/// - minmax: lo and hi are the extremes of the group: inv = top / (hi - lo), zero = -(lo inv), scale = 1 /
///   inv; with round_zero the zero is rounded to an integer.
/// - sym: with m = max(|lo|, |hi|): inv = top / (2 m), scale = 2 m / top, zero = 2^(bits-1), at 1 bit 0.5;
///   the zero is not stored (the convention of GPTQ, arXiv 2210.17323).
/// - mse: the same with (lo, hi) or m times (100 - i) / 100, for i = 0 to 79: the one with the least sum of
///   (w - value)^2, the first among equals.
/// - hqq: the half-quadratic solver (Badri & Shaji 2023, p = 0.7). Starts as minmax with inv at most 20000,
///   zero rounded with round_zero, and beta = 10; then up to 20 times, on all groups at once:
///   ```text
///   q = clamp(rint(w inv + zero)), d = w - (q - zero) scale
///   e = sign(d) max(0, |d| - |d|^(p-1) / beta)
///   zero = mean over the group of q - (w - e) inv,  beta = 1.01 beta
///   ```
///   until the mean of |d| over the matrix, rounded to float32, is no longer below the least so far (at first
///   10^4); the zero of that last step stays. Not with sym.
/// - hqq-scale-free: the same without the limit of inv, with e = 0 and with no first limit of the mean, so
///   that c w has the codes of w (c a power of two; up to rounding, any c). It gives the result of hqq where
///   all |d| are at most 1/8 and no range is below top / 20000, which holds for most language models.
/// - given: scale and zero are read: inv = 1 / scale, or 0 where scale is 0.
///
/// A group whose hi - lo (sym: m) is below 2^-100 is constant: its codes are 0, its zero -1 and its scale lo,
/// or 0 and 1 if lo is 0. A symmetric one has the scale 1, at 1 bit 0.
///
/// Excluded positions, in CSR form, are not fitted: they count as the nearest number between the extremes of
/// the rest of their group (0 if there is no rest), and get the code of that.
///
/// Sums over a group add element i to lane i mod 16, then the lanes 8, 4, 2 and 1 apart. Numeric class E:
/// codes, scales and zeros have the same bits on every CPU and for every number of threads.
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

/// Finds the codes of a matrix and, except for given grids, their scales and zeros. Throws InvalidArgument
/// for bits outside 1 to 8, a group_size of 0, below -1 or (axis 0) that does not divide the size, an axis
/// other than 0 and 1, gaps between rows on axis 0, hqq or round_zero with sym, wrong sizes of the outputs,
/// excluded positions outside the matrix, and a NaN, an infinity or a group with a range above the largest
/// float32, naming the position.
QTR_API void quantize(const QuantizeArgs& args);

/// Computes the values of codes. Throws InvalidArgument for bits, group_size and axis as quantize does, and
/// for sizes that do not go together.
QTR_API void dequantize(const DequantizeArgs& args);

/// Scales or zeros as float16, to nearest, ties to even, and the magnitudes among them that tell whether
/// float16 holds them well. Throws InvalidArgument for a count below 1 and null pointers.
QTR_API void round_to_half(const RoundToHalfArgs& args);

/// How many groups a matrix has.
QTR_API int64_t group_count(int64_t rows, int64_t cols, int64_t group_size, int axis);

/// \}

}  // namespace quantrature
