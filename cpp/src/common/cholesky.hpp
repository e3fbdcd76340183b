// The Cholesky factor of a positive definite matrix.
#pragma once

#include <cstdint>

namespace quantrature {

// Sizes that cholesky takes are multiples of this; a unit matrix in the corner fills up.
inline constexpr int64_t kCholeskyBlock = 64;

// Turns the lower triangle of a, n x n without gaps, into L with L L^T = a; what is above it is overwritten.
// Uses all threads; the result does not depend on their number. Returns whether a was positive definite; if
// it was not, a is of no use any more.
bool cholesky(double* a, int64_t n);

}  // namespace quantrature
