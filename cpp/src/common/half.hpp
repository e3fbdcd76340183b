// One number of each 16-bit float format, by bit arithmetic without branches, so that loops over them
// vectorise; on devices by the instructions for it, which give the same bits.
#pragma once

#include <bit>
#include <cstdint>

#include "common/host_device.hpp"

namespace quantrature {

QUANTRATURE_INLINE float f32_from_bf16(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

QUANTRATURE_INLINE uint16_t bf16_from_f32(float value) {
#ifdef __CUDA_ARCH__
  uint16_t nearest;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(nearest) : "f"(value));
  return value == value ? nearest : static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16 | 0x0040);
#else
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t nan = (bits >> 16) | 0x0040;
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7FFFFFFF) > 0x7F800000 ? nan : rounded);
#endif
}

QUANTRATURE_INLINE float f32_from_f16(uint16_t bits) {
#ifdef __CUDA_ARCH__
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(bits));
  return wide;
#else
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t magnitude = bits & 0x7FFF;
  // Shifted into place the exponent is 112 short; the product is exact, for subnormals too.
  const float finite = std::bit_cast<float>(magnitude << 13) * std::bit_cast<float>((127u + 112u) << 23);
  const uint32_t special = 0x7F800000 | magnitude << 13 | (magnitude > 0x7C00 ? 0x400000u : 0u);
  return std::bit_cast<float>(sign | (magnitude >= 0x7C00 ? special : std::bit_cast<uint32_t>(finite)));
#endif
}

QUANTRATURE_INLINE uint16_t f16_from_f32(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
#ifdef __CUDA_ARCH__
  uint16_t nearest;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(nearest) : "f"(value));
  const uint32_t nan = (bits >> 16 & 0x8000) | 0x7E00 | (bits >> 13 & 0x3FF);
  return value == value ? nearest : static_cast<uint16_t>(nan);
#else
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7FFFFFFF;
  const uint32_t normal = (magnitude + 0xFFF + ((magnitude >> 13) & 1) - 0x38000000) >> 13;
  // Adding 0.5 aligns the last bit of a subnormal float16, 2^-24, with the last bit of the sum, which then
  // rounds.
  const float small = std::bit_cast<float>(magnitude < 0x38800000 ? magnitude : 0u) + 0.5f;
  const uint32_t subnormal = std::bit_cast<uint32_t>(small) - 0x3F000000;
  const uint32_t nan = 0x7E00 | (magnitude >> 13 & 0x3FF);
  const uint32_t finite = magnitude < 0x38800000 ? subnormal : normal;
  const uint32_t special = magnitude > 0x7F800000 ? nan : 0x7C00;
  return static_cast<uint16_t>(sign | (magnitude >= 0x477FF000 ? special : finite));
#endif
}

}  // namespace quantrature
