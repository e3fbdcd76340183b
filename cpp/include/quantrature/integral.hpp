/// \defgroup integral The Post-quantization Integral
///
/// The Post-quantization Integral (PQI) of weights, arXiv 2503.01901: what each weight contributes to the
/// loss change of quantizing.
///
/// S_i = (w~_i - w_i) * integral over t in [0, 1] of dF/dw_i at w + t (w~ - w) is approximated by a sum over
/// nodes t_j with weights c_j: pqi_accumulate adds c_j * gradient to an accumulator for each node and sample,
/// pqi_finalize multiplies by w~ - w at the end, pqi_sum gives the sum of all S_i, which approximates F(w~) -
/// F(w), and interpolate moves the weights to a node.
///
/// All matrices of a call have one shape. Accumulators are float32; the others are float32, float16 or
/// bfloat16, widened to float32 first. Every product, sum and difference rounds once, to nearest, ties to
/// even: numeric class E, and L for pqi_sum. NaN and infinities pass through. An output may be the same
/// memory as an input of its dtype, and must not overlap one otherwise.
///
/// Error of an accumulator that started at zero, after n calls with weights c_j and gradients g_j, with u =
/// 2^-24, barring overflow and underflow:
/// ```text
/// |acc - sum(c_j * g_j)| <= (n + 1) u / (1 - (n + 1) u) * sum(|c_j * g_j|),
/// ```
/// which is one rounding of the weight, one of the product and n - 1 of the sum. pqi_finalize adds at most
/// two roundings.
#pragma once

#include "quantrature/types.hpp"

namespace quantrature {

/// \addtogroup integral
/// \{

/// Arguments of pqi_accumulate().
using PqiAccumulateArgs = qtr_pqi_accumulate_args;
/// Arguments of pqi_finalize().
using PqiFinalizeArgs = qtr_pqi_finalize_args;
/// Arguments of pqi_sum().
using PqiSumArgs = qtr_pqi_sum_args;
/// Arguments of interpolate().
using InterpolateArgs = qtr_interpolate_args;

/// acc += float32(weight) * grad, in place. Throws InvalidArgument for empty or unlike shapes, an accumulator
/// that is not float32, or a weight that is not finite in float32. Where not_finite is given, it becomes 1 if
/// grad has a NaN or an infinity, and stays as it is otherwise; the sums alone would not tell, which can
/// overflow, and which stay infinite.
QTR_API void pqi_accumulate(const PqiAccumulateArgs& args);

/// out = (w_quantized - w) * acc, or its absolute value.
QTR_API void pqi_finalize(const PqiFinalizeArgs& args);

/// The sum of (w_quantized - w) * acc over all elements, each widened to double first. Where all rows follow
/// each other without a gap, the elements are cut into chunks of 2048 across rows, else along each row; a
/// chunk is summed in 16 lanes, and chunks are added in order.
QTR_API void pqi_sum(const PqiSumArgs& args);

/// out = w + float32(t) * (w_quantized - w), formed in float32 and rounded to the dtype of out. t = 0 gives w
/// and t = 1 gives w_quantized, bit for bit where out has their dtype and else rounded once; elsewhere an
/// infinite difference gives what IEEE arithmetic says. Throws InvalidArgument for a t that is not finite.
QTR_API void interpolate(const InterpolateArgs& args);

/// \}

}  // namespace quantrature
