// Codes out of packed rows whose planes are whole blocks: rows of a multiple of 256 codes, aligned to 16
// bytes.
#pragma once

#include <cuda_runtime.h>

#include "device/planes.cuh"

namespace quantrature::cuda {

// Codes j to j + 3; j is a multiple of four.
template <int kBits>
__device__ __forceinline__ void four_codes(const uint8_t* row, int64_t cols, int64_t j,
                                           uint32_t (&codes)[4]) {
  int left = kBits;
  for (int k = 0; k < 4; ++k) codes[k] = 0;
#pragma unroll
  for (int p = 8; p > 0; p /= 2) {
    if (left < p) continue;
    left -= p;
    const int64_t block = j / (256 / p);
    const int shift = static_cast<int>(j % (256 / p)) / 8 * p;
    const uint4 words = *reinterpret_cast<const uint4*>(row + 32 * block + 4 * (j % 8));
    const uint32_t mask = (1u << p) - 1;
    codes[0] |= (words.x >> shift & mask) << left;
    codes[1] |= (words.y >> shift & mask) << left;
    codes[2] |= (words.z >> shift & mask) << left;
    codes[3] |= (words.w >> shift & mask) << left;
    row += plane_bytes(p, cols);
  }
}

}  // namespace quantrature::cuda
