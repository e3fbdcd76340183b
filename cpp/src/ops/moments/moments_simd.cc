// Written out in vectors: the compiler keeps neither the twelve sums of PowerSums in registers nor vectorises
// the minimum and maximum.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/moments/moments_simd.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <algorithm>
#include <limits>

#include "runtime/simd_kernels.hpp"

HWY_BEFORE_NAMESPACE();
namespace quantrature::HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

constexpr int kLanes = 16;
constexpr int64_t kMaxColumnRows = 128;  // kColumnRows of moments.cc

using Doubles = hn::ScalableTag<double>;
using Floats = hn::Rebind<float, Doubles>;
using Double = hn::Vec<Doubles>;
constexpr int kWidth = static_cast<int>(hn::MaxLanes(Doubles()));
constexpr int kVectors = kLanes / kWidth;

// What one reads of 16 numbers at a time: step numbers lie between one reading and the next.
struct Readings {
  const float* x;
  int64_t count;
  int64_t step;
};

// So far, unless value is below, or above; NaN is neither. Comparing and choosing takes three instructions,
// one behind the other, where these processors have one.
HWY_INLINE hn::Vec<Floats> LeastNumber(hn::Vec<Floats> value, hn::Vec<Floats> so_far) {
#if HWY_ARCH_X86 || HWY_ARCH_ARM_A64
  return hn::Min(value, so_far);
#else
  return hn::IfThenElse(hn::Lt(value, so_far), value, so_far);
#endif
}
HWY_INLINE hn::Vec<Floats> LargestNumber(hn::Vec<Floats> value, hn::Vec<Floats> so_far) {
#if HWY_ARCH_X86 || HWY_ARCH_ARM_A64
  return hn::Max(value, so_far);
#else
  return hn::IfThenElse(hn::Gt(value, so_far), value, so_far);
#endif
}

struct Extremes {
  float low[kLanes];
  float high[kLanes];
};

HWY_INLINE void Sums(const Readings& r, double* HWY_RESTRICT sum, Extremes& extremes) {
  const Doubles d;
  const Floats f;
  Double total[kVectors];
  hn::Vec<Floats> low[kVectors], high[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    total[v] = hn::Zero(d);
    low[v] = hn::Set(f, std::numeric_limits<float>::infinity());
    high[v] = hn::Set(f, -std::numeric_limits<float>::infinity());
  }
  for (int64_t i = 0; i < r.count; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      const auto value = hn::LoadU(f, r.x + i * r.step + v * kWidth);
      total[v] = hn::Add(total[v], hn::PromoteTo(d, value));
      low[v] = LeastNumber(value, low[v]);
      high[v] = LargestNumber(value, high[v]);
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    hn::StoreU(total[v], d, sum + v * kWidth);
    hn::StoreU(low[v], f, extremes.low + v * kWidth);
    hn::StoreU(high[v], f, extremes.high + v * kWidth);
  }
}

struct Powers {
  double sum2[kLanes];
  double sum3[kLanes];
  double sum4[kLanes];
};

// Arithmetic limits this: what is read next is fetched meanwhile.
HWY_INLINE void PowerSums(const Readings& r, const double* HWY_RESTRICT mean, Powers& powers,
                          const float* next) {
  const Doubles d;
  const Floats f;
  Double sum2[kVectors], sum3[kVectors], sum4[kVectors];
  for (int v = 0; v < kVectors; ++v) sum2[v] = sum3[v] = sum4[v] = hn::Zero(d);
  for (int64_t i = 0; i < r.count; ++i) {
    __builtin_prefetch(next + i * kLanes, 0, 2);
    for (int v = 0; v < kVectors; ++v) {
      const auto value = hn::PromoteTo(d, hn::LoadU(f, r.x + i * r.step + v * kWidth));
      const auto apart = hn::Sub(value, hn::LoadU(d, mean + v * kWidth));
      const auto square = hn::Mul(apart, apart);
      sum2[v] = hn::Add(sum2[v], square);
      sum3[v] = hn::Add(sum3[v], hn::Mul(square, apart));
      sum4[v] = hn::Add(sum4[v], hn::Mul(square, square));
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    hn::StoreU(sum2[v], d, powers.sum2 + v * kWidth);
    hn::StoreU(sum3[v], d, powers.sum3 + v * kWidth);
    hn::StoreU(sum4[v], d, powers.sum4 + v * kWidth);
  }
}

double AddLanes(double* lanes) {
  for (int apart = kLanes / 2; apart > 0; apart /= 2)
    for (int i = 0; i < apart; ++i) lanes[i] += lanes[i + apart];
  return lanes[0];
}

Moments MomentsOfChunk(const float* x, int64_t n) {
  const Readings whole{x, n / kLanes, kLanes};
  const int64_t rest = n - n % kLanes;

  double sum[kLanes];
  Extremes extremes;
  Sums(whole, sum, extremes);
  for (int64_t i = rest; i < n; ++i) {
    sum[i - rest] += static_cast<double>(x[i]);
    extremes.low[0] = x[i] < extremes.low[0] ? x[i] : extremes.low[0];
    extremes.high[0] = x[i] > extremes.high[0] ? x[i] : extremes.high[0];
  }
  const double mean = AddLanes(sum) / static_cast<double>(n);

  double means[kLanes];
  std::fill_n(means, kLanes, mean);
  Powers powers;
  PowerSums(whole, means, powers, x + n);
  for (int64_t i = rest; i < n; ++i) {
    const double apart = static_cast<double>(x[i]) - mean;
    const double square = apart * apart;
    powers.sum2[i - rest] += square;
    powers.sum3[i - rest] += square * apart;
    powers.sum4[i - rest] += square * square;
  }
  return Moments{static_cast<double>(n),
                 mean,
                 AddLanes(powers.sum2),
                 AddLanes(powers.sum3),
                 AddLanes(powers.sum4),
                 static_cast<double>(*std::min_element(extremes.low, extremes.low + kLanes)) + 0.0,
                 static_cast<double>(*std::max_element(extremes.high, extremes.high + kLanes)) + 0.0};
}

void MomentsOfColumns(const float* x, int64_t rows, int64_t cols, Moments* out) {
  float padded[kMaxColumnRows * kLanes];
  for (int64_t first = 0; first < cols; first += kLanes) {
    const int64_t width = std::min<int64_t>(kLanes, cols - first);
    Readings tile{x + first, rows, cols};
    if (width < kLanes) {
      std::fill_n(padded, rows * kLanes, 0.0f);
      for (int64_t r = 0; r < rows; ++r) std::copy_n(x + r * cols + first, width, padded + r * kLanes);
      tile = Readings{padded, rows, kLanes};
    }
    double mean[kLanes];
    Extremes extremes;
    Powers powers;
    Sums(tile, mean, extremes);
    for (int i = 0; i < kLanes; ++i) mean[i] /= static_cast<double>(rows);
    PowerSums(tile, mean, powers, tile.x);
    for (int64_t i = 0; i < width; ++i)
      out[first + i] = Moments{static_cast<double>(rows),
                               mean[i],
                               powers.sum2[i],
                               powers.sum3[i],
                               powers.sum4[i],
                               static_cast<double>(extremes.low[i]) + 0.0,
                               static_cast<double>(extremes.high[i]) + 0.0};
  }
}

void FillKernels(KernelTable& table) {
  table.moments_of_chunk = MomentsOfChunk;
  table.moments_of_columns = MomentsOfColumns;
}

}  // namespace
}  // namespace quantrature::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
QUANTRATURE_EXPORT_KERNELS(moments)
#endif
