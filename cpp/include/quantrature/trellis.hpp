/// \defgroup trellis Values and products of trellis codes
///
/// Computes weights from the codes of bitshift trellises: QTIP (Tseng et al. 2024, arXiv 2406.11235, section
/// 3).
///
/// A sequence of T weights is stored as a stream of T k bits, k = bits. Each step gives V weights. The state
/// of step t, t < T / V, is the L = state_bits bits of the stream that begin at bit t k V, the first bit the
/// highest. At its end, the stream continues with its beginning (tail-biting). A state alone determines the V
/// weights of its step:
///
/// ```text
/// weight V t + v = float32(raw(state)[v]) factor,  factor = float32(scale / rms)
/// ```
///
/// rms is the root mean square of raw over all 2^L states. raw depends on the code, in 32-bit arithmetic
/// modulo 2^32:
///
/// - 1mad: V = 1. u = 34038481 state + 76625530; raw is the sum of the four bytes of u, minus 510.
/// - 3inst: V = 1. u = 89226354 state + 64248484; u = (u & 0x8FFF8FFF) ^ 0x3B603B60; raw is the sum of the
///   two halves of u, read as float16, rounded to float16.
/// - hyb: V = 2. h = state (state + 1); raw is entry h >> 6 & 511 of a table of pairs of float16; if bit 15
///   of h is set, the second number is negated. Entry i lies on a spiral whose radii are distributed as those
///   of a two-dimensional normal distribution: radius sqrt(-2 log(1 - (i + 0.5) / 512)), angle 2 pi i
///   (sqrt(5) - 1) / 2, rounded from float64.
///
/// Bit i of a stream is bit 7 - i mod 8 of byte i / 8. A stream has ceil(T k / 8) bytes; unused bits are 0.
///
/// A matrix is cut into tiles of 16 x 16. The rows of a tile, one after the other, are a sequence with T =
/// 256, in 32 k bytes. The streams of the tiles are stored in row-major order of the tiles.
#pragma once

#include "quantrature/types.hpp"

namespace quantrature {

/// \addtogroup trellis
/// \{

/// qtr_trellis under its C++ name.
using Trellis = qtr_trellis;
/// Arguments of trellis_values().
using TrellisValuesArgs = qtr_trellis_values_args;
/// Arguments of trellis_dequantize().
using TrellisDequantizeArgs = qtr_trellis_dequantize_args;
/// Arguments of trellis_matvec().
using TrellisMatvecArgs = qtr_trellis_matvec_args;

/// Returns V, the number of weights of a step.
QTR_API int trellis_step_weights(qtr_trellis_code code);

/// Computes raw of all states, in the order of the states. Numeric class E. Throws InvalidArgument for an
/// unknown code, state_bits outside 2 to 16, or a wrong out_count.
QTR_API void trellis_values(const TrellisValuesArgs& args);

/// Computes the weights of streams. Numeric class E; 16-bit results are rounded from the float32 weight.
/// Throws InvalidArgument for an unknown code, bits outside 1 to 4, state_bits below max(2, bits V) or above
/// 16, a scale that is not finite, a number of columns that is not a multiple of V or whose stream has fewer
/// than state_bits bits, and a codes_size that does not fit the results.
QTR_API void trellis_dequantize(const TrellisDequantizeArgs& args);

/// Multiplies a tiled matrix by one or a few vectors. Each tile is decoded when it is multiplied, so the
/// dense weights are never in memory.
///
/// Numeric class B. Sums are float32 and may be fused: |error| <= 2^-23 (cols / 4 + 32) sum of |weight x|, if
/// no partial sum overflows float32. If a vector contains a NaN or an infinity, none of its results is
/// finite. Results have the same bits for every number of threads, and whether a vector is multiplied alone
/// or with others. Throws InvalidArgument as trellis_dequantize() does, for rows and cols that are not
/// multiples of 16, vectors and results of the wrong length or number, and results that are not float32.
QTR_API void trellis_matvec(const TrellisMatvecArgs& args);

/// \}

}  // namespace quantrature
