// Tiles of matrix products, the inner loop of what is made of them (Hessians, factors, error feedback):
//
//   c[i][j] += sum over l of a[l][i] b[l][j]    for 8 rows i and 32 (float) or 16 (double) columns j
//
// a has its 8 numbers of each l side by side, b and c a stride. Each element is summed in the order of l with
// fused multiply-adds: it has the same bits whatever the width of the vectors, and on every target that fuses
// (all but SSE2, SSSE3 and SSE4).
#pragma once

#include <cstdint>

namespace quantrature {

inline constexpr int64_t kTileRows = 8;
inline constexpr int64_t kTileFloats = 32;
inline constexpr int64_t kTileDoubles = 16;

}  // namespace quantrature
