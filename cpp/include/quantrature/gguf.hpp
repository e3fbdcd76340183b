/// \defgroup gguf Block types of GGUF
///
/// Matrices in the block types of GGUF, the files of llama.cpp: values of blocks, and blocks fitted to
/// weights.
///
/// Each row is cut into blocks. Most types have blocks of 32 numbers with a scale d, float16; the K types
/// have blocks of 256, cut into runs of 16 or 32 whose scales are multiples of d. The number of columns must
/// be a multiple of the block.
///
/// | type | block | bytes | numbers of a run | value of code q |
/// |---|---|---|---|---|
/// | Q4_0, Q5_0, Q8_0 | 32 | 18, 22, 34 | 32 | d (q - zero), zero = 8, 16, 128 |
/// | Q4_1, Q5_1 | 32 | 20, 24 | 32 | d q + m |
/// | IQ4_NL | 32 | 18 | 32 | d table[q], a table of 16 integers |
/// | Q2_K | 256 | 84 | 16 | d s q - dmin t, s and t of 4 bits |
/// | Q4_K, Q5_K | 256 | 144, 176 | 32 | d s q - dmin t, s and t of 6 bits |
/// | Q3_K | 256 | 110 | 16 | d s (q - 4), s from -32 to 31 |
/// | Q6_K | 256 | 210 | 16 | d s (q - 32), s from -128 to 127 |
///
/// Values are float32. Each product and each sum is rounded, d s and dmin t first. The values are bit for bit
/// those of the Python package gguf, which belongs to llama.cpp. If d is not finite, the values are not
/// finite.
///
/// Quantizing searches for the blocks with the least sum of weight (w - value)^2. It does not always find the
/// least sum. Weights are float32, one for each column or one for each element. If all weights of a run are
/// 0, its numbers have equal weights, which hardly count beside those of other runs.
///
/// - One scale for a block: scales are tried from 1.35 times the one whose codes span the numbers down to
///   about half of it, with both signs. For each, every number gets the nearest code, and least squares gives
///   the scale for these codes. The best one is rounded to float16, and its neighbours are tried.
/// - Scale and offset: the same from 64 ranges, and codes and line are found three times in turn.
/// - K types: for each run the best scale (and minimum) alone, as above. Then, for several d and dmin, the
///   multiples s and t near these. From the best of them, least squares gives d and dmin for the codes, then
///   multiples are chosen again, among more of them, while the error becomes smaller.
///
/// Errors are those of the values that the block has when it is read, but for ranges and runs alone, whose
/// scales are not rounded yet. Sums over a run are float32 and sums over a block double, in the order of the
/// numbers. The result for a block depends on its numbers and weights alone.
///
/// Numeric class E.
#pragma once

#include "quantrature/types.hpp"

namespace quantrature {

/// \addtogroup gguf
/// \{

/// Arguments of gguf_quantize().
using GgufQuantizeArgs = qtr_gguf_quantize_args;
/// Arguments of gguf_dequantize().
using GgufDequantizeArgs = qtr_gguf_dequantize_args;

/// A block type.
struct GgufTypeInfo {
  qtr_gguf_type type;   ///< number of the type in files
  const char* name;     ///< name of the type: "Q4_0", ...
  int32_t block_size;   ///< numbers of a block
  int32_t block_bytes;  ///< bytes of a block
};

/// How many types there are.
QTR_API int32_t gguf_type_count();

/// Type number i, from 0 to gguf_type_count() - 1. Throws InvalidArgument for another i.
QTR_API GgufTypeInfo gguf_type(int32_t i);

/// Bytes of a row of cols numbers. Throws InvalidArgument for an unknown type, and for cols that are no
/// positive multiple of its block.
QTR_API int64_t gguf_row_bytes(qtr_gguf_type type, int64_t cols);

/// Fits blocks to a matrix. Throws InvalidArgument for an unknown type, columns that are no multiple of the
/// block, weights or data of another size, a number that is not finite or above 65504 in magnitude (scales
/// are float16), and weights that are negative, not finite, or all 0; the message names the position.
QTR_API void gguf_quantize(const GgufQuantizeArgs& args);

/// Computes the values of blocks. Throws InvalidArgument for an unknown type, columns that are no multiple of
/// the block, data of another size, and values that are not float32.
QTR_API void gguf_dequantize(const GgufDequantizeArgs& args);

/// \}

}  // namespace quantrature
