/// \defgroup viterbi The best trellis codes for given numbers
///
/// Trellis codes for given numbers: QTIP (Tseng et al. 2024, arXiv 2406.11235), section 3.1 and algorithm 4.
///
/// For each row the stream whose weights (trellis.hpp) have the least sum of squared distances, found as
/// follows. The search is in integers, so that it is the same everywhere. With unit = 2^12, and 2^13 where
/// bits > 2,
///
/// ```text
/// c(s)[v] = rint(unit raw(s)[v] / rms), x(i) = rint(unit x[i] / scale), both limited to +-32767,
/// e_t(s) = sum over v of (d d + 2^14) >> 15,  d = min(|c(s)[v] - x(V t + v)|, 32767),
/// C_t+1(u) = max(0, min over s with s mod 2^(L - kV) = u of min(65535, C_t(s >> kV) + e_t(s)) - least C_t)
/// ```
///
/// where C_t(u), u < 2^(L - kV), is the cost of the best walk over which the last L - kV bits are u, less
/// what all have in common. Of the predecessors of equal cost the one with the lowest state is taken. Two
/// passes: the first over the sequence rotated right by floor(T / 2V) steps, from C_0 = 0 to the cheapest
/// end, the lowest of equal ones; it gives the bits u* that the walk shares across the seam. The second over
/// the sequence itself from u* (C_0(u*) = 0, all others 65535) to u*.
///
/// x is float32, float16 or bfloat16; NaN and infinities are refused. Distances beyond 8 units of scale (4
/// where bits > 2) count as that, costs beyond 128 (32) above the best are cut off.
#pragma once

#include "quantrature/trellis.hpp"

namespace quantrature {

/// \addtogroup viterbi
/// \{

/// Arguments of trellis_quantize().
using TrellisQuantizeArgs = qtr_trellis_quantize_args;

/// Finds the streams of sequences. Numeric class E. Throws InvalidArgument as trellis_dequantize does, for a
/// scale that is not positive, and for numbers that are not finite.
QTR_API void trellis_quantize(const TrellisQuantizeArgs& args);

/// \}

}  // namespace quantrature
