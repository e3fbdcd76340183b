/// \defgroup packing Codes of 1 to 8 bits, packed without gaps
///
/// Codes of 1 to 8 bits, packed without gaps. Checkpoints hold this layout: it never changes.
///
/// Each row of cols codes is packed on its own into row_bytes(cols, bits) = bits * ceil(cols / 8) bytes.
///
/// Planes. The bits of a code are cut from the top into planes as wide as possible:
///
/// ```text
/// bits of a code     8    7      6    5    4  3    2  1
/// bits of its planes 8    4+2+1  4+2  4+1  4  2+1  2  1
/// ```
///
/// So the plane of 4 of a 7-bit code holds code >> 3, its plane of 2 (code >> 1) & 3 and its plane of 1 code
/// & 1. A row stores its planes one after the other, the widest first; a plane of p bits has p * ceil(cols /
/// 8) bytes.
///
/// Blocks. A plane is cut into blocks of 256 / p codes. Lane i of 8 owns codes i, i + 8, i + 16, ... of the
/// block: code 8 k + i is the lane's number k. A block is eight little-endian uint32 words, one a lane, and
/// the lane's number k has bits [p k, p k + p) of the word:
///
/// ```text
/// p = 4, 64 codes:   word i  =  c[i] | c[8+i] << 4 | c[16+i] << 8 | ... | c[56+i] << 28
/// ```
///
/// The last block of a plane may have fewer codes, rem of them. Then each lane has n = ceil(rem / 8) numbers,
/// and the eight fields of n p bits follow each other as one little-endian stream: the lane's number k has
/// bits [(n i + k) p, (n i + k + 1) p) of it, where bit b is bit b mod 8 of byte b / 8. A full block is the
/// case n = 32 / p. Codes that a last block is short of are 0.
///
/// Numeric class E.
#pragma once

#include "quantrature/types.hpp"

namespace quantrature {

/// \addtogroup packing
/// \{

/// Arguments of pack().
using PackArgs = qtr_pack_args;
/// Arguments of unpack().
using UnpackArgs = qtr_unpack_args;

/// Bytes of one packed row. Throws InvalidArgument for bits outside 1 to 8 or cols below 1.
QTR_API int64_t row_bytes(int64_t cols, int bits);

/// Packs codes. Throws InvalidArgument for an empty matrix, bits outside 1 to 8, a wrong row_bytes, or a code
/// that does not fit, naming the first one.
QTR_API void pack(const PackArgs& args);

/// Unpacks codes. Throws InvalidArgument for an empty matrix, bits outside 1 to 8, or a wrong row_bytes.
QTR_API void unpack(const UnpackArgs& args);

/// \}

}  // namespace quantrature
