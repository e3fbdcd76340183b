/// \defgroup trellis Values and products of trellis codes
///
/// Weights from bitshift trellises: QTIP (Tseng et al. 2024, arXiv 2406.11235, section 3).
///
/// A sequence of T weights is a stream of T k bits, where k is bits. V weights are read at a time: the state
/// of step t, t < T / V, is the state_bits = L bits from bit t k V on, the first the highest; beyond the end
/// the stream begins again (tail-biting). A state gives V weights on its own:
///
/// ```text
/// weight V t + v = float32(raw(state)[v]) factor,  factor = float32(scale / rms)
/// ```
///
/// where rms is the root of the mean square of raw over all 2^L states. In 32-bit arithmetic modulo 2^32:
///
/// - 1mad: V = 1. u = 34038481 state + 76625530; raw is the sum of the four bytes of u, minus 510.
/// - 3inst: V = 1. u = 89226354 state + 64248484; u = (u & 0x8FFF8FFF) ^ 0x3B603B60; raw is the sum of its
///   two halves as float16, rounded to float16.
/// - hyb: V = 2. h = state (state + 1); raw is entry h >> 6 & 511 of a table of float16 pairs, the second
///   number negated if bit 15 of h is set. Entry i lies on a spiral with the radii of a normal distribution
///   of two dimensions: radius sqrt(-2 log(1 - (i + 0.5) / 512)), angle 2 pi i (sqrt(5) - 1) / 2, rounded
///   from double.
///
/// Stream bit i is bit 7 - i mod 8 of byte i / 8; a stream has ceil(T k / 8) bytes, the bits left over are 0.
///
/// A matrix is cut into tiles of 16 x 16. Each is the sequence of its rows, T = 256, in 32 k bytes; the
/// streams follow tile row after tile row.
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

/// How many weights a state gives, V.
QTR_API int trellis_step_weights(qtr_trellis_code code);

/// Computes raw of all states, state after state. Numeric class E. Throws InvalidArgument for an unknown
/// code, state_bits outside 2 to 16, or a wrong out_count.
QTR_API void trellis_values(const TrellisValuesArgs& args);

/// Computes the weights of streams. Numeric class E; 16-bit results are rounded from the float32 weight.
/// Throws InvalidArgument for an unknown code, bits outside 1 to 4, state_bits below bits V or above 16, a
/// scale that is not finite, a number of columns that V does not divide or with less than state_bits bits,
/// and a codes_size that does not go with the results.
QTR_API void trellis_dequantize(const TrellisDequantizeArgs& args);

/// Products of a tiled matrix and one or a few vectors. The weights are never stored: tiles are decoded on
/// the way.
///
/// Numeric class B. Sums are of float32 and may be fused: |error| <= 2^-23 (cols / 4 + 32) sum of |weight x|,
/// as long as no partial sum leaves float32. A NaN or an infinity in a vector leaves none of its results
/// finite. The same bits for every number of threads, and for a vector alone or among others. Throws
/// InvalidArgument as trellis_dequantize does, for rows and cols that 16 does not divide, vectors and results
/// of another length or number, and results that are not float32.
QTR_API void trellis_matvec(const TrellisMatvecArgs& args);

/// \}

}  // namespace quantrature
