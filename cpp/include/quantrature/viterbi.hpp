/// \defgroup viterbi Trellis codes for given numbers
///
/// Finds trellis codes for given numbers: QTIP (Tseng et al. 2024, arXiv 2406.11235), section 3.1 and
/// algorithm 4.
///
/// For each row x, the search looks for the stream whose weights (trellis.hpp) have the smallest sum of
/// squared distances to x. It computes in integers, so that the result is the same on every CPU. With unit =
/// 2^12 for bits <= 2, and 2^13 for bits > 2:
///
/// ```text
/// c(s)[v] = rint(unit raw(s)[v] / rms), x(i) = rint(unit x[i] / scale), both limited to +-32767,
/// e_t(s) = sum over v of (d d + 2^14) >> 15,  d = min(|c(s)[v] - x(V t + v)|, 32767),
/// C_t+1(u) = max(0, min over s with s mod 2^(L - kV) = u of min(65535, C_t(s >> kV) + e_t(s)) - least C_t)
/// ```
///
/// C_t(u), u < 2^(L - kV), is the cost of the best path whose last L - kV bits are u, minus the costs that
/// were subtracted from all paths so far. Of states s of equal cost, the lowest is taken.
///
/// Beginning and end of a stream share L - kV bits (tail-biting). Two passes find them and the path:
///
/// 1. The first pass takes the sequence rotated right by floor(T / 2V) steps. It starts with C_0 = 0 for all
///    u, and ends at the u of the smallest cost, the lowest of equal ones. Its path gives the shared bits u*.
/// 2. The second pass takes the sequence itself. It starts from u* (C_0(u*) = 0, all others 65535) and ends
///    at u*.
///
/// x is float32, float16 or bfloat16; NaN and infinities are refused. Distances above 8 scale (4 scale for
/// bits > 2) count as this limit. Costs more than 128 scale^2 (32 scale^2) above the smallest are limited to
/// it.
#pragma once

#include "quantrature/trellis.hpp"

namespace quantrature {

/// \addtogroup viterbi
/// \{

/// Arguments of trellis_quantize().
using TrellisQuantizeArgs = qtr_trellis_quantize_args;

/// Finds the stream of each row of x. Numeric class E. Throws InvalidArgument as trellis_dequantize() does,
/// for a scale that is not positive, and for numbers that are not finite.
QTR_API void trellis_quantize(const TrellisQuantizeArgs& args);

/// \}

}  // namespace quantrature
