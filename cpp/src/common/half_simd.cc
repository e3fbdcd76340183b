// Plain loops: the compiler vectorises them for each target.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "common/half_simd.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "common/half.hpp"
#include "runtime/simd_kernels.hpp"

HWY_BEFORE_NAMESPACE();
namespace quantrature::HWY_NAMESPACE {
namespace {

void F16ToF32(const uint16_t* HWY_RESTRICT in, float* HWY_RESTRICT out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = f32_from_f16(in[i]);
}

void Bf16ToF32(const uint16_t* HWY_RESTRICT in, float* HWY_RESTRICT out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = f32_from_bf16(in[i]);
}

void F32ToF16(const float* HWY_RESTRICT in, uint16_t* HWY_RESTRICT out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = f16_from_f32(in[i]);
}

void F32ToBf16(const float* HWY_RESTRICT in, uint16_t* HWY_RESTRICT out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = bf16_from_f32(in[i]);
}

void FillKernels(KernelTable& table) {
  table.f16_to_f32 = F16ToF32;
  table.bf16_to_f32 = Bf16ToF32;
  table.f32_to_f16 = F32ToF16;
  table.f32_to_bf16 = F32ToBf16;
}

}  // namespace
}  // namespace quantrature::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
QUANTRATURE_EXPORT_KERNELS(half)
#endif
