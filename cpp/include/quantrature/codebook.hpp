/// \defgroup codebook Codes that stand for entries of a table
///
/// Codebook grids: codes of 1 to 8 bits that stand for the entries of a table, with or without a scale for
/// each group of weights.
///
/// The table has 2^bits entries, in any order and with repetitions; there is one for the matrix, or one for
/// each of its rows. Groups are as on axis 1 of grid.hpp: each row is cut into groups of group_size numbers,
/// the last one possibly shorter; -1 makes each row one group, and 0 does without scales.
///
/// ```text
/// scale = max |w| over the group, 0 if that is below 2^-100;  inv = 1 / scale, or 0
/// code  = that of the entry nearest to w inv; without scales nearest to w
/// value = entry scale, rounded to the dtype of the output; without scales the entry
/// ```
///
/// Matrix, table and scale are float32, float16 or bfloat16. NaN and infinities in the matrix and the table
/// are refused when codes are searched for, and pass through when they are read. Products are rounded to
/// float32; the search is exact: of two equally near entries it takes the lower, of equal entries the first.
/// Codes are packed row by row (packing.hpp). Excluded positions, in CSR form, take no part in the scale
/// (which is 0 if nothing else is in a group) and get the code of the nearest entry.
///
/// The tables of QLoRA (Dettmers et al., arXiv 2305.14314, appendix E) with groups of 64 are NF4; SqueezeLLM
/// (arXiv 2306.07629) has a table of its own for each row, without scales.
///
/// Numeric class E.
#pragma once

#include "quantrature/types.hpp"

namespace quantrature {

/// \addtogroup codebook
/// \{

/// Arguments of codebook_quantize().
using CodebookQuantizeArgs = qtr_codebook_quantize_args;
/// Arguments of codebook_dequantize().
using CodebookDequantizeArgs = qtr_codebook_dequantize_args;

/// Finds the codes of a matrix, and with groups their scales. Throws InvalidArgument for bits outside 1 to 8,
/// a group_size below -1, a table of another size, scales without groups or the reverse, wrong sizes of the
/// outputs, excluded positions outside the matrix, and a NaN or infinity in the matrix or the table, naming
/// the position.
QTR_API void codebook_quantize(const CodebookQuantizeArgs& args);

/// Computes the values of codes. Throws InvalidArgument for bits, group_size and table as codebook_quantize
/// does, and for sizes that do not go together.
QTR_API void codebook_dequantize(const CodebookDequantizeArgs& args);

/// \}

}  // namespace quantrature
