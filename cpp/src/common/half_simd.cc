// Plain loops, which the compiler vectorises for each target, but for float16 where there are instructions
// for it.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "common/half_simd.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "common/half.hpp"
#include "runtime/simd_kernels.hpp"

HWY_BEFORE_NAMESPACE();
namespace quantrature::HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

// F16C comes with AVX2. Highway's own conversions of other targets pass over infinity and NaN.
#if (HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX2) || HWY_ARCH_ARM_A64
#define QUANTRATURE_HALF_INSTRUCTIONS 1
#else
#define QUANTRATURE_HALF_INSTRUCTIONS 0
#endif

void F16ToF32(const uint16_t* HWY_RESTRICT in, float* HWY_RESTRICT out, int64_t n) {
  int64_t i = 0;
#if QUANTRATURE_HALF_INSTRUCTIONS
  const hn::ScalableTag<float> d;
  const hn::Rebind<hwy::float16_t, decltype(d)> half;
  const hn::Rebind<uint16_t, decltype(d)> bits;
  const auto width = static_cast<int64_t>(hn::Lanes(d));
  for (; i + width <= n; i += width)
    hn::StoreU(hn::PromoteTo(d, hn::BitCast(half, hn::LoadU(bits, in + i))), d, out + i);
#endif
  for (; i < n; ++i) out[i] = f32_from_f16(in[i]);
}

void Bf16ToF32(const uint16_t* HWY_RESTRICT in, float* HWY_RESTRICT out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = f32_from_bf16(in[i]);
}

void F32ToF16(const float* HWY_RESTRICT in, uint16_t* HWY_RESTRICT out, int64_t n) {
  int64_t i = 0;
#if QUANTRATURE_HALF_INSTRUCTIONS
  const hn::ScalableTag<float> d;
  const hn::Rebind<hwy::float16_t, decltype(d)> half;
  const hn::Rebind<uint16_t, decltype(d)> bits;
  const auto width = static_cast<int64_t>(hn::Lanes(d));
  for (; i + width <= n; i += width)
    hn::StoreU(hn::BitCast(bits, hn::DemoteTo(half, hn::LoadU(d, in + i))), bits, out + i);
#endif
  for (; i < n; ++i) out[i] = f16_from_f32(in[i]);
}

void F32ToBf16(const float* HWY_RESTRICT in, uint16_t* HWY_RESTRICT out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = bf16_from_f32(in[i]);
}

#undef QUANTRATURE_HALF_INSTRUCTIONS

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
