// Written out in vectors: the butterflies between neighbours exchange numbers within a vector, four at a
// time; all others add and subtract whole vectors, two levels in a pass. The order of additions is that of
// the reference.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/hadamard/hadamard_simd.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "runtime/simd_kernels.hpp"

HWY_BEFORE_NAMESPACE();
namespace quantrature::HWY_NAMESPACE {
namespace {

#if HWY_TARGET != HWY_SCALAR

namespace hn = hwy::HWY_NAMESPACE;

using Floats = hn::CappedTag<float, 16>;
using Float = hn::Vec<Floats>;
using Four = hn::FixedTag<float, 4>;
constexpr int64_t kWidth = static_cast<int64_t>(hn::MaxLanes(Floats()));

// Four numbers, transformed: neighbours, then pairs.
HWY_INLINE hn::Vec<Four> TransformFour(hn::Vec<Four> v) {
  const Four d;
  HWY_ALIGN static constexpr float kOdd[4] = {0.0f, -0.0f, 0.0f, -0.0f};
  HWY_ALIGN static constexpr float kHigh[4] = {0.0f, 0.0f, -0.0f, -0.0f};
  v = hn::Add(hn::Shuffle2301(v), hn::Xor(v, hn::Load(d, kOdd)));
  return hn::Add(hn::Shuffle1032(v), hn::Xor(v, hn::Load(d, kHigh)));
}

// Two levels of butterflies of whole vectors of D: halves of `half` and 2 half numbers.
template <class D>
HWY_INLINE void TwoLevels(D d, float* HWY_RESTRICT x, int64_t n, int64_t half) {
  const auto width = static_cast<int64_t>(hn::MaxLanes(d));
  for (int64_t begin = 0; begin < n; begin += 4 * half)
    for (int64_t i = begin; i < begin + half; i += width) {
      const auto x0 = hn::LoadU(d, x + i), x1 = hn::LoadU(d, x + i + half);
      const auto x2 = hn::LoadU(d, x + i + 2 * half), x3 = hn::LoadU(d, x + i + 3 * half);
      const auto a = hn::Add(x0, x1), b = hn::Sub(x0, x1), c = hn::Add(x2, x3), e = hn::Sub(x2, x3);
      hn::StoreU(hn::Add(a, c), d, x + i);
      hn::StoreU(hn::Add(b, e), d, x + i + half);
      hn::StoreU(hn::Sub(a, c), d, x + i + 2 * half);
      hn::StoreU(hn::Sub(b, e), d, x + i + 3 * half);
    }
}

template <class D>
HWY_INLINE void OneLevel(D d, float* HWY_RESTRICT x, int64_t n, int64_t half) {
  const auto width = static_cast<int64_t>(hn::MaxLanes(d));
  for (int64_t begin = 0; begin < n; begin += 2 * half)
    for (int64_t i = begin; i < begin + half; i += width) {
      const auto a = hn::LoadU(d, x + i), b = hn::LoadU(d, x + i + half);
      hn::StoreU(hn::Add(a, b), d, x + i);
      hn::StoreU(hn::Sub(a, b), d, x + i + half);
    }
}

void Sylvester(float* HWY_RESTRICT x, int64_t n) {
  if (n == 2) {
    const float a = x[0], b = x[1];
    x[0] = a + b, x[1] = a - b;
  }
  if (n < 4) return;
  const Four four;
  for (int64_t i = 0; i < n; i += 4) hn::StoreU(TransformFour(hn::LoadU(four, x + i)), four, x + i);
  int64_t half = 4;
  if (n >= 16)
    TwoLevels(four, x, n, half), half *= 4;
  else if (n == 8)
    OneLevel(four, x, n, half), half *= 2;
  for (; 4 * half <= n; half *= 4) TwoLevels(Floats(), x, n, half);
  if (half < n) OneLevel(Floats(), x, n, half);
}

void Factor(const float* HWY_RESTRICT x, int64_t order, const float* HWY_RESTRICT factor, int64_t block,
            float* HWY_RESTRICT out) {
  const Floats d;
  constexpr int64_t kSums = 4;  // in flight
  int64_t i = 0;
  for (; i + kWidth <= block; i += kWidth) {
    int64_t c = 0;
    for (; c + kSums <= order; c += kSums) {
      Float sum[kSums];
      const Float first = hn::LoadU(d, x + i);
      for (int64_t k = 0; k < kSums; ++k) sum[k] = hn::Mul(hn::Set(d, factor[c + k]), first);
      for (int64_t b = 1; b < order; ++b) {
        const Float at = hn::LoadU(d, x + b * block + i);
        for (int64_t k = 0; k < kSums; ++k)
          sum[k] = hn::Add(sum[k], hn::Mul(hn::Set(d, factor[b * order + c + k]), at));
      }
      for (int64_t k = 0; k < kSums; ++k) hn::StoreU(sum[k], d, out + (c + k) * block + i);
    }
    for (; c < order; ++c) {
      Float sum = hn::Mul(hn::Set(d, factor[c]), hn::LoadU(d, x + i));
      for (int64_t b = 1; b < order; ++b)
        sum = hn::Add(sum, hn::Mul(hn::Set(d, factor[b * order + c]), hn::LoadU(d, x + b * block + i)));
      hn::StoreU(sum, d, out + c * block + i);
    }
  }
  for (; i < block; ++i)
    for (int64_t c = 0; c < order; ++c) {
      float sum = factor[c] * x[i];
      for (int64_t b = 1; b < order; ++b) sum += factor[b * order + c] * x[b * block + i];
      out[c * block + i] = sum;
    }
}

#endif

void FillKernels(KernelTable& table) {
#if HWY_TARGET == HWY_SCALAR
  static_cast<void>(table);
#else
  table.hadamard_sylvester = Sylvester;
  table.hadamard_factor = Factor;
#endif
}

}  // namespace
}  // namespace quantrature::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
QUANTRATURE_EXPORT_KERNELS(hadamard)
#endif
