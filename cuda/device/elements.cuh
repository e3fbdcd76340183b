// Numbers of any dtype as float32, one or four at a time.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/half.hpp"
#include "quantrature/c_api.h"

namespace quantrature::cuda {

struct Four {
  float v[4];
};

inline int64_t bytes_of(qtr_dtype dtype) {
  return dtype == QTR_F32 ? 4 : 2;
}

// The dtype is the same for all threads: the branches cost nothing beside the memory.
QUANTRATURE_INLINE float load(const void* data, qtr_dtype dtype, int64_t i) {
  if (dtype == QTR_F32) return static_cast<const float*>(data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  return dtype == QTR_F16 ? f32_from_f16(bits) : f32_from_bf16(bits);
}

QUANTRATURE_INLINE void store(void* data, qtr_dtype dtype, int64_t i, float value) {
  if (dtype == QTR_F32)
    static_cast<float*>(data)[i] = value;
  else
    static_cast<uint16_t*>(data)[i] = dtype == QTR_F16 ? f16_from_f32(value) : bf16_from_f32(value);
}

// Elements 4 i to 4 i + 3; data is aligned for that.
QUANTRATURE_INLINE Four load4(const void* data, qtr_dtype dtype, int64_t i) {
  if (dtype == QTR_F32) {
    const float4 f = static_cast<const float4*>(data)[i];
    return {{f.x, f.y, f.z, f.w}};
  }
  const uint2 two = static_cast<const uint2*>(data)[i];
  const uint32_t words[2] = {two.x, two.y};
  Four r;
  for (int k = 0; k < 4; ++k) {
    const uint16_t bits = static_cast<uint16_t>(words[k / 2] >> (k % 2 * 16));
    r.v[k] = dtype == QTR_F16 ? f32_from_f16(bits) : f32_from_bf16(bits);
  }
  return r;
}

QUANTRATURE_INLINE void store4(void* data, qtr_dtype dtype, int64_t i, const Four& f) {
  if (dtype == QTR_F32) {
    static_cast<float4*>(data)[i] = make_float4(f.v[0], f.v[1], f.v[2], f.v[3]);
    return;
  }
  uint32_t words[2] = {};
  for (int k = 0; k < 4; ++k) {
    const uint32_t bits = dtype == QTR_F16 ? f16_from_f32(f.v[k]) : bf16_from_f32(f.v[k]);
    words[k / 2] |= bits << (k % 2 * 16);
  }
  static_cast<uint2*>(data)[i] = make_uint2(words[0], words[1]);
}

// Two numbers of a 16-bit dtype, the first in the lower half of a word. Not for NaN, whose bits processors
// choose.
template <qtr_dtype kDtype>
QUANTRATURE_INLINE uint32_t two_halves(float first, float second) {
#if defined(__CUDA_ARCH__)
  uint32_t word;
  if constexpr (kDtype == QTR_F16)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
#else
  const auto half = [](float x) -> uint32_t {
    return kDtype == QTR_F16 ? f16_from_f32(x) : bf16_from_f32(x);
  };
  return half(first) | half(second) << 16;
#endif
}

}  // namespace quantrature::cuda
