/// \defgroup matvec Products of a packed matrix and vectors
///
/// Products of a matrix of packed codes, on a grid or of a codebook, with outliers beside it, and any number
/// of vectors.
///
/// With code, scale and zero as in grid.hpp (axis 1), for row i of the matrix and a vector x
///
/// ```text
/// y[i] = sum over j of (code[i, j] - zero) scale x[j]  +  sum over the residuals of row i of r x[column]
/// ```
///
/// where the residual of an outlier is what it adds to the value of the grid at its place, so that the
/// outlier takes the place of that value. Numbers of 16 bits are widened first. Results of 16 bits are
/// rounded from float32, to nearest, ties to even.
///
/// Numeric class B. Sums are of float32 and may be fused; x may be rounded, in runs of 64 columns from the
/// first on, to integers of 24 bits times a power of two of the run. Let m be the largest |x| of the run that
/// a column lies in. Against the exact sum of the formula,
///
/// ```text
/// |error| <= 2^-23 (cols / 8 + 32) (sum of (code + |zero|) |scale x|  +  sum of |r x|)
///            +  2^-22 sum of code |scale| m  +  2^-110 sum of |scale|
/// ```
///
/// as long as no partial sum leaves float32; to this the rounding of a result of 16 bits is added. Where x
/// has infinities or NaN, no result is finite. The same bits for every number of threads, and for a vector
/// alone or among others.
///
/// With activations int8, the numbers of each run are first rounded to the nearest integer multiple of m /
/// 127 (to zero, if m < 2^-120), for the codes and the zeros; residuals are multiplied with x itself. This
/// adds
///
/// ```text
/// |error| <= (1 + 2^-16) sum of |code - zero| |scale| m / 254
///            +  2^-23 (cols / 8 + 32) sum of (code + |zero|) |scale| m / 254  +  2^-110 sum of |scale|
/// ```
///
/// and multiplies codes and x as bytes where the CPU has AVX-512 with VNNI and VBMI; elsewhere it takes as
/// long as float32.
///
/// With a table, codes stand for its entries, as in codebook.hpp: there is one table for the matrix or one
/// for each row, no zeros, and with group_size 0 no scales. With value as dequantize has it in float32,
///
/// ```text
/// y[i] = sum over j of value[i, j] x[j]  +  sum over the residuals of row i of r x[column]
/// |error| <= 2^-23 (cols / 8 + 32) (sum of |value x|  +  sum of |r x|)
/// ```
///
/// on every target; x is rounded with activations int8 alone, which adds (1 + 2^-16) sum of |value| m / 254 +
/// 2^-110 sum of |value| and is no faster. The same holds for threads, vectors alone or among others, and
/// what is not finite in x; with that in the table or the scales, the results of its rows alone are
/// unspecified. Codes of up to 4 bits in groups of a multiple of 32 are looked up in vectors where the CPU
/// has AVX2 or better; others are decoded, a row at a time for all vectors of a tile.
///
/// A tile of up to 16 vectors is multiplied with each code as it is unpacked, so that products with many
/// vectors (prefill) need neither the dense matrix nor a part of it.
#pragma once

#include "quantrature/types.hpp"

namespace quantrature {

/// \addtogroup matvec
/// \{

/// qtr_grid_matrix under its C++ name.
using GridMatrix = qtr_grid_matrix;
/// Arguments of residuals().
using ResidualsArgs = qtr_residuals_args;
/// Arguments of matvec().
using MatvecArgs = qtr_matvec_args;

/// out[k] is the value k of outliers minus what w has at its place, which is computed as dequantize does; the
/// difference is rounded to float32 once. Numeric class E. Throws InvalidArgument for bits, group_size, table
/// and sizes that do not go together, and for outliers that check_csr refuses or that have another shape than
/// w.
QTR_API void residuals(const ResidualsArgs& args);

/// Multiplies a matrix of codes by each row of x. Throws InvalidArgument for w as residuals does, for
/// residuals of another shape than w or another dtype than float32, vectors and results of another length or
/// number, and unknown activations. That check_csr accepts the residuals is taken for granted: to look
/// through them takes as long as to multiply.
QTR_API void matvec(const MatvecArgs& args);

/// \}

}  // namespace quantrature
