// Written out in vectors: the compiler would neither keep the 16 lanes of the sums in registers nor vectorise
// the extremes. Rounding adds and subtracts 2^23, which is exact to nearest, ties to even, on numbers from 0
// to 255.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/grid/grid_simd.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>

#include "ops/grid/line.hpp"
#include "runtime/simd_kernels.hpp"

HWY_BEFORE_NAMESPACE();
namespace quantrature::HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

constexpr int kLanes = 16;

using Floats = hn::CappedTag<float, kLanes>;
using Ints = hn::RebindToSigned<Floats>;
using Bytes = hn::Rebind<uint8_t, Floats>;
using Float = hn::Vec<Floats>;
constexpr int kWidth = static_cast<int>(hn::MaxLanes(Floats()));
constexpr int kVectors = kLanes / kWidth;
constexpr float kRounder = 8388608.0f;  // 2^23

HWY_INLINE float AddLanes(float* lanes) {
  for (int apart = kLanes / 2; apart > 0; apart /= 2)
    for (int i = 0; i < apart; ++i) lanes[i] += lanes[i + apart];
  return lanes[0];
}

HWY_INLINE Float Code(Float scaled, Float zero, Float top) {
  const Floats d;
  const Float at = hn::Min(hn::Max(hn::Add(scaled, zero), hn::Zero(d)), top);
  return hn::Sub(hn::Add(at, hn::Set(d, kRounder)), hn::Set(d, kRounder));
}

float ScalarCode(float x, float inv, float zero, float top) {
  const float at = x * inv + zero;
  return (std::min(std::max(at, 0.0f), top) + kRounder) - kRounder;
}

// ---- fit ----

struct Range {
  float lo;
  float hi;
};

// odd gathers x - x, which is 0 but for what is not finite.
HWY_INLINE Range RangeOf(const float* HWY_RESTRICT x, int64_t n, Float& odd) {
  const Floats d;
  if (n < kLanes) {
    Range r{x[0], x[0]};
    for (int64_t i = 0; i < n; ++i) {
      odd = hn::Or(odd, hn::Set(d, x[i] - x[i]));
      r.lo = x[i] < r.lo ? x[i] : r.lo;
      r.hi = x[i] > r.hi ? x[i] : r.hi;
    }
    return r;
  }
  Float lo[kVectors], hi[kVectors];
  for (int v = 0; v < kVectors; ++v) lo[v] = hi[v] = hn::LoadU(d, x + v * kWidth);
  const auto see = [&](int64_t i) HWY_ATTR {
    for (int v = 0; v < kVectors; ++v) {
      const Float value = hn::LoadU(d, x + i + v * kWidth);
      odd = hn::Or(odd, hn::Sub(value, value));
      lo[v] = hn::Min(lo[v], value);
      hi[v] = hn::Max(hi[v], value);
    }
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) see(i);
  if (i < n) see(n - kLanes);
  for (int v = 1; v < kVectors; ++v) {
    lo[0] = hn::Min(lo[0], lo[v]);
    hi[0] = hn::Max(hi[0], hi[v]);
  }
  return {hn::GetLane(hn::MinOfLanes(d, lo[0])), hn::GetLane(hn::MaxOfLanes(d, hi[0]))};
}

// The last numbers of a group, fewer than 16, with zeros behind them, and masks for those that are there.
struct Tail {
  float x[kLanes];
  int64_t whole;
  int64_t rest;
  Tail(const float* source, int64_t n) : whole(n - n % kLanes), rest(n % kLanes) {
    if (rest == 0) return;
    std::fill_n(x, kLanes, 0.0f);
    std::copy_n(source + whole, rest, x);
  }
  HWY_INLINE hn::Mask<Floats> mask(int v) const {
    return hn::FirstN(Floats(), static_cast<size_t>(std::max<int64_t>(0, rest - v * kWidth)));
  }
};

HWY_INLINE float SquaredError(const float* HWY_RESTRICT x, const Tail& tail, const GridLine& line,
                              float top_value) {
  const Floats d;
  const Float inv = hn::Set(d, line.inv), zero = hn::Set(d, line.zero), scale = hn::Set(d, line.scale),
              top = hn::Set(d, top_value);
  Float sum[kVectors];
  for (int v = 0; v < kVectors; ++v) sum[v] = hn::Zero(d);
  const auto square = [&](Float value) HWY_ATTR {
    const Float code = Code(hn::Mul(value, inv), zero, top);
    const Float apart = hn::Sub(value, hn::Mul(hn::Sub(code, zero), scale));
    return hn::Mul(apart, apart);
  };
  for (int64_t i = 0; i < tail.whole; i += kLanes)
    for (int v = 0; v < kVectors; ++v) sum[v] = hn::Add(sum[v], square(hn::LoadU(d, x + i + v * kWidth)));
  if (tail.rest > 0)
    for (int v = 0; v < kVectors; ++v)
      sum[v] = hn::Add(sum[v], hn::IfThenElseZero(tail.mask(v), square(hn::LoadU(d, tail.x + v * kWidth))));
  float lanes[kLanes];
  for (int v = 0; v < kVectors; ++v) hn::StoreU(sum[v], d, lanes + v * kWidth);
  return AddLanes(lanes);
}

GridLine LeastSquaredError(const float* x, int64_t n, const Range& range, const GridRule& rule) {
  const float top = top_code(rule.bits);
  GridLine best = line_of_range(range.lo, range.hi, rule);
  if (best.inv == 0) return best;
  const Tail tail(x, n);
  float least = SquaredError(x, tail, best, top);
  for (int i = 1; i < kMseCandidates; ++i) {
    const GridLine line = line_of_range(range.lo * shrink_factor(i), range.hi * shrink_factor(i), rule);
    const float error = SquaredError(x, tail, line, top);
    if (error < least) best = line, least = error;
  }
  return best;
}

// line_of_range for min-max grids whose zero is not rounded, on extremes in lines.inv and lines.scale.
HWY_INLINE void LinesOfRanges(int64_t groups, const GridRule& rule, const GridLines& lines, bool& finite) {
  const Floats d;
  const Float top = hn::Set(d, top_code(rule.bits)), max_inv = hn::Set(d, rule.max_inv),
              one = hn::Set(d, 1.0f), smallest = hn::Set(d, 0x1p-100f), largest = hn::Set(d, 3.40282347e38f);
  int64_t g = 0;
  for (; rule.sym && g + kWidth <= groups; g += kWidth) {
    const Float m = hn::Max(hn::Abs(hn::LoadU(d, lines.inv + g)), hn::Abs(hn::LoadU(d, lines.scale + g)));
    const Float range = hn::Add(m, m);
    finite = finite && hn::AllTrue(d, hn::Le(range, largest));
    const auto nothing = hn::Lt(m, smallest);
    hn::StoreU(hn::IfThenZeroElse(nothing, hn::Div(top, range)), d, lines.inv + g);
    hn::StoreU(hn::Set(d, symmetric_zero(rule.bits)), d, lines.zero + g);
    const Float empty = rule.bits == 1 ? hn::Zero(d) : one;
    hn::StoreU(hn::IfThenElse(nothing, empty, hn::Div(range, top)), d, lines.scale + g);
  }
  for (; !rule.sym && g + kWidth <= groups; g += kWidth) {
    const Float lo = hn::Add(hn::LoadU(d, lines.inv + g), hn::Zero(d)), hi = hn::LoadU(d, lines.scale + g);
    const Float range = hn::Sub(hi, lo);
    finite = finite && hn::AllTrue(d, hn::Le(range, largest));
    const auto constant = hn::Lt(range, smallest);
    const auto nothing = hn::And(constant, hn::Eq(lo, hn::Zero(d)));
    const Float inv = hn::Min(hn::Div(top, range), max_inv);
    const Float zero = hn::Sub(hn::Zero(d), hn::Mul(lo, inv));
    const Float flat_zero = hn::IfThenElse(nothing, hn::Zero(d), hn::Neg(one));
    hn::StoreU(hn::IfThenZeroElse(constant, inv), d, lines.inv + g);
    hn::StoreU(hn::IfThenElse(constant, flat_zero, zero), d, lines.zero + g);
    hn::StoreU(hn::IfThenElse(constant, hn::IfThenElse(nothing, one, lo), hn::Div(one, inv)), d,
               lines.scale + g);
  }
  for (; g < groups; ++g) {
    const Range range{lines.inv[g], lines.scale[g]};
    finite = finite && range_is_finite(range.lo, range.hi, rule.sym);
    const GridLine line = line_of_range(range.lo, range.hi, rule);
    lines.inv[g] = line.inv;
    lines.zero[g] = line.zero;
    lines.scale[g] = line.scale;
  }
}

bool GridFit(const float* x, int64_t n, int64_t group, const GridRule& rule, const GridLines& lines) {
  const Floats d;
  Float odd = hn::Zero(d);
  bool finite = true;
  const bool many = !rule.round_zero && !rule.mse;
  for (int64_t g = 0, begin = 0; begin < n; ++g, begin += group) {
    const int64_t size = std::min(group, n - begin);
    const Range range = RangeOf(x + begin, size, odd);
    if (many) {
      lines.inv[g] = range.lo;
      lines.scale[g] = range.hi;
      continue;
    }
    finite = finite && range_is_finite(range.lo, range.hi, rule.sym);
    const GridLine line = rule.mse && finite ? LeastSquaredError(x + begin, size, range, rule)
                                             : line_of_range(range.lo, range.hi, rule);
    lines.inv[g] = line.inv;
    lines.zero[g] = line.zero;
    lines.scale[g] = line.scale;
  }
  if (many) LinesOfRanges((n + group - 1) / group, rule, lines, finite);
  return finite && hn::AllTrue(d, hn::Eq(odd, hn::Zero(d)));
}

// ---- hqq ----

struct Sums {
  float shifts[kLanes];
  float distances[kLanes];
  bool shrinks;  // some shrink(d) may not be 0; shifts are then of no use
};

HWY_INLINE void Iterate(const float* HWY_RESTRICT x, const Tail& tail, const GridLine& line, float top_value,
                        Sums& sums) {
  const Floats d;
  const Float inv = hn::Set(d, line.inv), zero = hn::Set(d, line.zero), scale = hn::Set(d, line.scale),
              top = hn::Set(d, top_value);
  Float shift[kVectors], distance[kVectors], longest[kVectors];
  for (int v = 0; v < kVectors; ++v) shift[v] = distance[v] = longest[v] = hn::Zero(d);
  for (int64_t i = 0; i < tail.whole; i += kLanes) {
    for (int v = 0; v < kVectors; ++v) {
      const Float value = hn::LoadU(d, x + i + v * kWidth);
      const Float scaled = hn::Mul(value, inv);
      const Float code = Code(scaled, zero, top);
      const Float apart = hn::Abs(hn::Sub(value, hn::Mul(hn::Sub(code, zero), scale)));
      shift[v] = hn::Add(shift[v], hn::Sub(code, scaled));
      distance[v] = hn::Add(distance[v], apart);
      longest[v] = hn::Max(longest[v], apart);
    }
  }
  if (tail.rest > 0) {
    for (int v = 0; v < kVectors; ++v) {
      const Float value = hn::LoadU(d, tail.x + v * kWidth);
      const Float scaled = hn::Mul(value, inv);
      const Float code = Code(scaled, zero, top);
      const Float apart =
          hn::IfThenElseZero(tail.mask(v), hn::Abs(hn::Sub(value, hn::Mul(hn::Sub(code, zero), scale))));
      shift[v] = hn::Add(shift[v], hn::IfThenElseZero(tail.mask(v), hn::Sub(code, scaled)));
      distance[v] = hn::Add(distance[v], apart);
      longest[v] = hn::Max(longest[v], apart);
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    hn::StoreU(shift[v], d, sums.shifts + v * kWidth);
    hn::StoreU(distance[v], d, sums.distances + v * kWidth);
    longest[0] = hn::Max(longest[0], longest[v]);
  }
  sums.shrinks = !hn::AllTrue(d, hn::Le(longest[0], hn::Set(d, kShrinksToZero)));
}

// Weights so large that the shrinking acts are rare: one by one.
void ShrunkShifts(const float* x, int64_t n, const GridLine& line, float top, double beta, float* shifts) {
  std::fill_n(shifts, kLanes, 0.0f);
  for (int64_t i = 0; i < n; ++i) {
    const float code = ScalarCode(x[i], line.inv, line.zero, top);
    const float apart = x[i] - (code - line.zero) * line.scale;
    shifts[i % kLanes] += code - (x[i] - shrink(apart, beta)) * line.inv;
  }
}

void GridHqq(const float* x, int64_t n, int64_t group, int bits, const GridLines& lines, float* zeros,
             double* errors) {
  const float top = top_code(bits);
  std::fill_n(errors, kHqqIterations, 0.0);
  for (int64_t g = 0, begin = 0; begin < n; ++g, begin += group, zeros += kHqqIterations) {
    const int64_t size = std::min(group, n - begin);
    GridLine line{lines.inv[g], lines.zero[g], lines.scale[g]};
    if (line.inv == 0) {
      std::fill_n(zeros, kHqqIterations, line.zero);
      continue;
    }
    const Tail tail(x + begin, size);
    double beta = 10;
    for (int i = 0; i < kHqqIterations; ++i, beta *= 1.01) {
      Sums sums;
      Iterate(x + begin, tail, line, top, sums);
      if (sums.shrinks) ShrunkShifts(x + begin, size, line, top, beta, sums.shifts);
      const float zero = AddLanes(sums.shifts) / static_cast<float>(size);
      const double error = static_cast<double>(AddLanes(sums.distances));
      errors[i] += error;
      zeros[i] = zero;
      // Without shrinking a step depends on the zero alone: from here on all are the same.
      if (zero == line.zero && !sums.shrinks) {
        for (int j = i + 1; j < kHqqIterations; ++j) {
          errors[j] += error;
          zeros[j] = zero;
        }
        break;
      }
      line.zero = zero;
    }
  }
}

// ---- codes ----

// The bits of 2^23 + v, as integers, rise with v: so what is too large for a code still is when the integers
// are narrowed to bytes, where one comparison stops four times as many numbers.
void GridEncode(const float* HWY_RESTRICT x, int64_t n, int64_t group, int bits,
                const float* HWY_RESTRICT inv, const float* HWY_RESTRICT zero, uint8_t* HWY_RESTRICT codes) {
  const Floats d;
  const Ints ints;
  const Float rounder = hn::Set(d, kRounder);
  const auto raised = hn::BitCast(ints, rounder);
  const auto top = hn::Set(Bytes(), static_cast<uint8_t>(top_code(bits)));
  for (int64_t g = 0, begin = 0; begin < n; ++g, begin += group) {
    const int64_t end = std::min(begin + group, n);
    const Float inverse = hn::Set(d, inv[g]), zeros = hn::Set(d, zero[g]);
    int64_t i = begin;
    for (; i + kWidth <= end; i += kWidth) {
      const Float at = hn::Max(hn::Add(hn::Mul(hn::LoadU(d, x + i), inverse), zeros), hn::Zero(d));
      const auto code = hn::Sub(hn::BitCast(ints, hn::Add(at, rounder)), raised);
      hn::StoreU(hn::Min(hn::DemoteTo(Bytes(), code), top), Bytes(), codes + i);
    }
    for (; i < end; ++i) codes[i] = static_cast<uint8_t>(ScalarCode(x[i], inv[g], zero[g], top_code(bits)));
  }
}

HWY_INLINE Float Widened(const uint8_t* codes) {
  return hn::ConvertTo(Floats(), hn::PromoteTo(Ints(), hn::LoadU(Bytes(), codes)));
}

void GridDecode(const uint8_t* HWY_RESTRICT codes, int64_t n, int64_t group, const float* HWY_RESTRICT zero,
                const float* HWY_RESTRICT scale, float* HWY_RESTRICT out) {
  const Floats d;
  if (group == 1) {
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth)
      hn::StoreU(hn::Mul(hn::Sub(Widened(codes + i), hn::LoadU(d, zero + i)), hn::LoadU(d, scale + i)), d,
                 out + i);
    for (; i < n; ++i) out[i] = (static_cast<float>(codes[i]) - zero[i]) * scale[i];
    return;
  }
  for (int64_t g = 0, begin = 0; begin < n; ++g, begin += group) {
    const int64_t end = std::min(begin + group, n);
    const Float zeros = hn::Set(d, zero[g]), scales = hn::Set(d, scale[g]);
    int64_t i = begin;
    for (; i + kWidth <= end; i += kWidth)
      hn::StoreU(hn::Mul(hn::Sub(Widened(codes + i), zeros), scales), d, out + i);
    for (; i < end; ++i) out[i] = (static_cast<float>(codes[i]) - zero[g]) * scale[g];
  }
}

void FillKernels(KernelTable& table) {
  table.grid_fit = GridFit;
  table.grid_hqq = GridHqq;
  table.grid_encode = GridEncode;
  table.grid_decode = GridDecode;
}

}  // namespace
}  // namespace quantrature::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
QUANTRATURE_EXPORT_KERNELS(grid)
#endif
