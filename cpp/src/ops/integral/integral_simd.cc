// Written out in vectors: outputs may be inputs, which keeps the compiler from vectorising loops over them.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/integral/integral_simd.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <cmath>

#include "runtime/simd_kernels.hpp"

HWY_BEFORE_NAMESPACE();
namespace quantrature::HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

constexpr int kLanes = 16;

using Floats = hn::ScalableTag<float>;
using Doubles = hn::ScalableTag<double>;
using HalfFloats = hn::Rebind<float, Doubles>;
constexpr int kWidth = static_cast<int>(hn::MaxLanes(Doubles()));
constexpr int kVectors = kLanes / kWidth;

void PqiAccumulate(float* acc, const float* grad, float weight, int64_t n) {
  const Floats f;
  const int64_t width = static_cast<int64_t>(hn::Lanes(f));
  const auto factor = hn::Set(f, weight);
  const auto step = [&](int64_t at) HWY_ATTR {
    hn::StoreU(hn::Add(hn::LoadU(f, acc + at), hn::Mul(factor, hn::LoadU(f, grad + at))), f, acc + at);
  };
  int64_t i = 0;
  for (; i + 4 * width <= n; i += 4 * width)
    for (int64_t v = 0; v < 4; ++v) step(i + v * width);
  for (; i + width <= n; i += width) step(i);
  for (; i < n; ++i) acc[i] += weight * grad[i];
}

void PqiFinalize(const float* acc, const float* w, const float* w_quantized, bool keep_sign, float* out,
                 int64_t n) {
  const Floats f;
  const hn::RebindToUnsigned<Floats> u;
  const int64_t width = static_cast<int64_t>(hn::Lanes(f));
  const auto kept = hn::BitCast(f, hn::Set(u, keep_sign ? 0xFFFFFFFFu : 0x7FFFFFFFu));
  int64_t i = 0;
  for (; i + width <= n; i += width) {
    const auto moved = hn::Sub(hn::LoadU(f, w_quantized + i), hn::LoadU(f, w + i));
    hn::StoreU(hn::And(kept, hn::Mul(moved, hn::LoadU(f, acc + i))), f, out + i);
  }
  for (; i < n; ++i) {
    const float share = (w_quantized[i] - w[i]) * acc[i];
    out[i] = keep_sign ? share : std::abs(share);
  }
}

double PqiSum(const float* acc, const float* w, const float* w_quantized, int64_t n) {
  const Doubles d;
  const HalfFloats h;
  hn::Vec<Doubles> sum[kVectors];
  for (int v = 0; v < kVectors; ++v) sum[v] = hn::Zero(d);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = i + v * kWidth;
      const auto moved =
          hn::Sub(hn::PromoteTo(d, hn::LoadU(h, w_quantized + at)), hn::PromoteTo(d, hn::LoadU(h, w + at)));
      sum[v] = hn::Add(sum[v], hn::Mul(moved, hn::PromoteTo(d, hn::LoadU(h, acc + at))));
    }
  }
  double lanes[kLanes];
  for (int v = 0; v < kVectors; ++v) hn::StoreU(sum[v], d, lanes + v * kWidth);
  for (int lane = 0; i < n; ++i, ++lane)
    lanes[lane] +=
        (static_cast<double>(w_quantized[i]) - static_cast<double>(w[i])) * static_cast<double>(acc[i]);
  for (int apart = kLanes / 2; apart > 0; apart /= 2)
    for (int lane = 0; lane < apart; ++lane) lanes[lane] += lanes[lane + apart];
  return lanes[0];
}

void Interpolate(const float* w, const float* w_quantized, float t, float* out, int64_t n) {
  const Floats f;
  const int64_t width = static_cast<int64_t>(hn::Lanes(f));
  const auto factor = hn::Set(f, t);
  int64_t i = 0;
  for (; i + width <= n; i += width) {
    const auto start = hn::LoadU(f, w + i);
    hn::StoreU(hn::Add(start, hn::Mul(factor, hn::Sub(hn::LoadU(f, w_quantized + i), start))), f, out + i);
  }
  for (; i < n; ++i) out[i] = w[i] + t * (w_quantized[i] - w[i]);
}

void FillKernels(KernelTable& table) {
  table.pqi_accumulate = PqiAccumulate;
  table.pqi_finalize = PqiFinalize;
  table.pqi_sum = PqiSum;
  table.interpolate = Interpolate;
}

}  // namespace
}  // namespace quantrature::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
QUANTRATURE_EXPORT_KERNELS(integral)
#endif
