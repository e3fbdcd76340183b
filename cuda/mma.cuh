// Tensor cores: products of tiles of bfloat16, added in float32.
#pragma once

#include "launch.cuh"

namespace quantrature::cuda {

// Two numbers that bfloat16 holds exactly; a comes first in memory.
__device__ __forceinline__ uint32_t two_bf16(float a, float b) {
  return std::bit_cast<uint32_t>(a) >> 16 | (std::bit_cast<uint32_t>(b) & 0xFFFF0000u);
}

// d += a b, for a of 16 x 16 and b of 16 x 8; the threads of a warp share them. With lane = 4 g + t, d is
// (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1); a has pairs of columns 2 t of rows g and g + 8,
// then of columns 2 t + 8; b has pairs of rows 2 t and 2 t + 8 of column g.
__device__ __forceinline__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#ifdef QUANTRATURE_CUDA_ON_HOST
  cuda_on_host::multiply_add(d, a, b);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

}  // namespace quantrature::cuda
