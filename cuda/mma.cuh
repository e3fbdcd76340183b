// Tensor cores: products of tiles of bfloat16, added in float32.
#pragma once

#include "common/half.hpp"
#include "launch.cuh"

namespace quantrature::cuda {

// Two fields of kBits bits, up to 4, of a word, the first at bit `at`, the other 16 bits higher; each times
// 2^left, as a bfloat16. Set below the exponent of 2^(7 + left), a field is the mantissa of a number, which
// is then taken off.
template <int kBits>
__device__ __forceinline__ uint32_t two_fields(uint32_t word, int at, int left) {
  constexpr uint32_t kMask = ((1u << kBits) - 1) * 0x00010001u;
  const uint32_t base = (0x4300u + (static_cast<uint32_t>(left) << 7)) * 0x00010001u;
  const uint32_t above = (word >> at & kMask) | base;
#ifdef QUANTRATURE_CUDA_ON_HOST
  const auto half = [](uint32_t two, int which) {
    return f32_from_bf16(static_cast<uint16_t>(two >> 16 * which));
  };
  const auto apart = [&](int which) { return bf16_from_f32(half(above, which) - half(base, which)); };
  return apart(0) | static_cast<uint32_t>(apart(1)) << 16;
#else
  uint32_t fields;  // above times 1 minus base, exact
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(fields) : "r"(above), "r"(0x3F803F80u), "r"(base ^ 0x80008000u));
  return fields;
#endif
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
