/// \defgroup matvec Products of a packed matrix and vectors
///
/// Multiplies a matrix of packed codes, on a grid or of a codebook, by any number of vectors. The matrix may
/// have outliers: weights that are stored exactly in a sparse matrix.
///
/// With code, scale and zero as in grid.hpp (axis 1), for row i of the matrix and a vector x:
///
/// ```text
/// y[i] = sum over j of (code[i, j] - zero) scale x[j]  +  sum over the residuals of row i of r x[column]
/// ```
///
/// The residual r of an outlier is its value minus the value of the grid at its position, so that the sum
/// counts the outlier in place of the grid's value. 16-bit numbers are converted to float32 first. 16-bit
/// results are rounded from float32 to nearest, ties to even.
///
/// Numeric class B. Sums are float32 and may be fused. x may be rounded in runs of 64 columns, counted from
/// column 0, to 24-bit integers times a power of two of the run. Let m be the largest |x| in the run of a
/// column. The error against the exact sum of the formula is
///
/// ```text
/// |error| <= 2^-23 (cols / 8 + 32) (sum of (code + |zero|) |scale x|  +  sum of |r x|)
///            +  2^-22 sum of code |scale| m  +  2^-110 sum of |scale|
/// ```
///
/// if no partial sum overflows float32. The rounding of a 16-bit result is added to this error. If x contains
/// an infinity or a NaN, none of its results is finite. Results have the same bits for every number of
/// threads, and whether a vector is multiplied alone or with others.
///
/// With activations int8, the numbers of each run are first rounded to the nearest integer multiple of m /
/// 127 (to zero if m < 2^-120), for the codes and the zeros. Residuals are multiplied by x itself. This adds
///
/// ```text
/// |error| <= (1 + 2^-16) sum of |code - zero| |scale| m / 254
///            +  2^-23 (cols / 8 + 32) sum of (code + |zero|) |scale| m / 254  +  2^-110 sum of |scale|
/// ```
///
/// If the CPU has AVX-512 with VNNI and VBMI, codes and x are then multiplied as bytes. On other CPUs, int8
/// takes as long as float32.
///
/// With a table, codes stand for its entries, as in codebook.hpp: there is one table for the matrix or one
/// for each row, and there are no zeros; with group_size 0 there are no scales either. Let value be the
/// float32 result of codebook_dequantize(). On every target,
///
/// ```text
/// y[i] = sum over j of value[i, j] x[j]  +  sum over the residuals of row i of r x[column]
/// |error| <= 2^-23 (cols / 8 + 32) (sum of |value x|  +  sum of |r x|)
/// ```
///
/// Here x is rounded only with activations int8. This adds (1 + 2^-16) sum of |value| m / 254 + 2^-110 sum of
/// |value|, and is not faster. The statements above on threads, on vectors alone or with others, and on
/// infinities and NaN in x hold here, too. If the table or the scales contain an infinity or a NaN, the
/// results of the rows that use it are unspecified. Codes of up to 4 bits in groups of a multiple of 32 are
/// looked up in vector registers if the CPU has AVX2 or better. Other codes are decoded row by row, once for
/// all vectors of a tile.
///
/// Vectors are multiplied in tiles of up to 16: each code is unpacked once for all vectors of a tile.
/// Products with many vectors (prefill) therefore need no memory for the dense matrix or a part of it.
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

/// Computes the residuals of outliers: out[k] is the k-th value of outliers minus the value of w at its
/// position, as dequantize() or codebook_dequantize() computes it in float32. The difference is rounded to
/// float32 once. Numeric class E. Throws InvalidArgument for bits, group_size, table and sizes that do not
/// fit together, for outliers that check_csr() refuses, and for outliers that do not have the shape of w.
QTR_API void residuals(const ResidualsArgs& args);

/// Multiplies a matrix of codes by each row of x. Throws InvalidArgument for w as residuals() does, for
/// residuals that are not float32 or do not have the shape of w, for vectors and results of the wrong length
/// or number, and for unknown activations. The residuals must be a matrix that check_csr() accepts. This is
/// not checked here, because a check takes as long as the product.
QTR_API void matvec(const MatvecArgs& args);

/// \}

}  // namespace quantrature
