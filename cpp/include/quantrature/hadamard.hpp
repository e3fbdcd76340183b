/// \defgroup hadamard Random orthogonal transforms
///
/// Orthogonal transforms of rows that spread every number over all others, with random signs: the incoherence
/// processing of QuIP# (Tseng et al. 2024, arXiv 2402.04396, section 3) and QTIP (arXiv 2406.11235).
///
/// Forward, y = (x with the signs) A; inverse, x = (y A^T) with the signs. A is n x n and orthogonal:
///
/// ```text
/// A = F (x) H_p / sqrt(n),  n = q p,  element (b p + i, c p + j) = F[b, c] H_p[i, j] / sqrt(n)
/// ```
///
/// where p is a power of two and H_p is Sylvester's matrix, H_p[i, j] = (-1)^popcount(i & j). With n = o 2^e
/// and o odd, the factor F of order q is
///
/// - if o = 1: 1, of order 1; A is the Walsh-Hadamard transform.
/// - else the Hadamard matrix of the least order q = o 2^j <= 512, 2 <= j <= e, that one of Paley's
///   constructions has (Paley 1933): the first, where q - 1 is a prime of the form 4 i + 3, else the second,
///   where q / 2 - 1 is a prime of the form 4 i + 1.
/// - if there is none, sqrt(q) times the orthonormal discrete cosine transform (DCT-II) of order q = o; F[b,
///   c] is number c of the transform of unit vector b.
///
/// A prime r gives Q[i, j] = chi(i - j), the quadratic character modulo r. With S the matrix that borders Q
/// with a first row 0, 1, ..., 1 and a first column 0, s, ..., s, the first construction is I + S with s =
/// -1, and the second replaces each 0 of S with s = 1 by [1 -1; -1 -1] and each 1 by [1 1; 1 -1] times it.
///
/// Numbers of 16 bits are widened first and rounded at the end. In float32 the butterflies of H_p go from
/// neighbours to halves, then F is applied with sums in the order of b, then 1 / sqrt(n), rounded once;
/// nothing is fused. The inverse is the same with F^T. A NaN or an infinity makes numbers of its row NaN or
/// infinite, and no other row's. Numeric class E: the same bits on every target and for every number of
/// threads. Against the exact transform the error of an element is at most
///
/// ```text
/// 2^-24 (log2(p) + q + 4) sum over i of |x[i]| |A[i, j]|.
/// ```
#pragma once

#include "quantrature/types.hpp"

namespace quantrature {

/// \addtogroup hadamard
/// \{

/// Arguments of random_signs().
using RandomSignsArgs = qtr_random_signs_args;
/// Arguments of hadamard().
using HadamardArgs = qtr_hadamard_args;

/// Independent fair signs from a counter: bit i is bit i mod 64 of mix(seed + (i / 64 + 1)
/// 0x9E3779B97F4A7C15) modulo 2^64, where mix is that of splitmix64 (Steele, Lea, Flood 2014): z ^= z >> 30,
/// z *= 0xBF58476D1CE4E5B9, z ^= z >> 27, z *= 0x94D049BB133111EB, z ^= z >> 31. Bits of the last byte beyond
/// count are 0. Throws InvalidArgument for a count below 1 or a null pointer.
QTR_API void random_signs(const RandomSignsArgs& args);

/// The order q of the factor that the transform of n numbers has; throws InvalidArgument for n below 1.
QTR_API int64_t hadamard_order(int64_t n);

/// Transforms each row of a matrix. Throws InvalidArgument for an empty matrix, results of another shape, and
/// columns whose order is above 2048.
QTR_API void hadamard(const HadamardArgs& args);

/// \}

}  // namespace quantrature
