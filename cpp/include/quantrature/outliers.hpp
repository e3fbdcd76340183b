/// \defgroup outliers Dense remainder and sparse outliers
///
/// A matrix as a dense remainder and a sparse matrix of its outliers.
///
/// Outliers are the largest elements by absolute value, chosen as topk.hpp says, of the matrix or of each
/// row; or those at given positions. The remainder is the matrix with 0 at their places; the sparse matrix
/// has their values, so that putting these back into the remainder gives the matrix bit for bit. Numeric
/// class E.
#pragma once

#include "quantrature/types.hpp"

namespace quantrature {

/// \addtogroup outliers
/// \{

/// Arguments of extract_outliers().
using OutliersArgs = qtr_outliers_args;
/// qtr_csr under its C++ name.
using Csr = qtr_csr;

/// Writes remainder, values (nnz of w's dtype), columns (nnz) and row_offsets (rows + 1), as qtr_csr has
/// them, where nnz is count, or rows * count with per_row. Throws InvalidArgument as topk does, and for a
/// remainder of another shape or dtype, or indices that are not ascending and within w. NaN is refused unless
/// indices are given; a remainder other than w may then hold anything.
QTR_API void extract_outliers(const OutliersArgs& args);

/// Checks a sparse matrix. Throws InvalidArgument, naming the field, unless row_offsets rise from 0 to nnz
/// and the columns of each row ascend and are within cols.
QTR_API void check_csr(const Csr& csr);

/// \}

}  // namespace quantrature
