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
#include "ops/packing/span.hpp"
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

// odd gathers 0 x, which is 0 but for what is not finite.
HWY_INLINE Range RangeOf(const float* HWY_RESTRICT x, int64_t n, Float& odd) {
  const Floats d;
  if (n < kLanes) {
    Range r{x[0], x[0]};
    for (int64_t i = 0; i < n; ++i) {
      odd = hn::Add(odd, hn::Set(d, x[i] * 0.0f));
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
      odd = hn::MulAdd(value, hn::Zero(d), odd);
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

#if HWY_TARGET != HWY_SCALAR

// Of each lane the best of all blocks of four.
template <class D, class Better>
HWY_INLINE void StoreBest(D d, hn::Vec<D> x, Better better, float* HWY_RESTRICT to) {
  if constexpr (hn::MaxLanes(D()) == 4) {
    hn::StoreU(x, d, to);
  } else {
    const hn::Half<D> half;
    StoreBest(half, better(hn::LowerHalf(half, x), hn::UpperHalf(half, x)), better, to);
  }
}

// What is read next, a page of memory or two further on, is fetched while it is computed: half of it in the
// fit, half in the encoding, so that the memory always has something to do and never too much.

// Four groups of as many whole vectors each, to four numbers in each of lo and hi. To find the least lane of
// one vector takes as long as a short group does; of four together it takes a third of that.
HWY_INLINE void RangesOfFour(const float* HWY_RESTRICT x, int64_t group, const float* next, Float (&odd)[4],
                             float* HWY_RESTRICT lo, float* HWY_RESTRICT hi) {
  const Floats d;
  Float least[4], largest[4];
  for (int k = 0; k < 4; ++k) least[k] = largest[k] = hn::LoadU(d, x + k * group);
  for (int64_t i = 0; i < group; i += kWidth) {
    __builtin_prefetch(next + 2 * i, 0, 2);
    __builtin_prefetch(next + 2 * i + kWidth, 0, 2);
    for (int k = 0; k < 4; ++k) {
      const Float value = hn::LoadU(d, x + k * group + i);
      odd[k] = hn::MulAdd(value, hn::Zero(d), odd[k]);
      least[k] = hn::Min(least[k], value);
      largest[k] = hn::Max(largest[k], value);
    }
  }
  const auto transposed = [&](const Float(&of)[4], auto&& better) HWY_ATTR {
    const hn::RepartitionToWide<Floats> pairs;
    const auto half = [&](Float a, Float b) HWY_ATTR {
      return better(hn::InterleaveLower(d, a, b), hn::InterleaveUpper(d, a, b));
    };
    const auto ab = hn::BitCast(pairs, half(of[0], of[1])), cd = hn::BitCast(pairs, half(of[2], of[3]));
    return better(hn::BitCast(d, hn::InterleaveLower(pairs, ab, cd)),
                  hn::BitCast(d, hn::InterleaveUpper(pairs, ab, cd)));
  };
  const auto min = [](auto a, auto b) HWY_ATTR { return hn::Min(a, b); };
  const auto max = [](auto a, auto b) HWY_ATTR { return hn::Max(a, b); };
  StoreBest(d, transposed(least, min), min, lo);
  StoreBest(d, transposed(largest, max), max, hi);
}

#endif

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
  Float odd[4];
  for (Float& o : odd) o = hn::Zero(d);
  bool finite = true;
  const bool many = !rule.round_zero && !rule.mse && rule.is_plain();
  int64_t g = 0;
#if HWY_TARGET != HWY_SCALAR
  if (many && group % kWidth == 0)
    for (; (g + 4) * group <= n; g += 4)
      RangesOfFour(x + g * group, group, x + n + g * group / 2, odd, lines.inv + g, lines.scale + g);
#endif
  for (; g * group < n; ++g) {
    const int64_t begin = g * group, size = std::min(group, n - begin);
    const Range range = RangeOf(x + begin, size, odd[0]);
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
  const Float sum = hn::Add(hn::Add(odd[0], odd[1]), hn::Add(odd[2], odd[3]));
  return finite && hn::AllTrue(d, hn::Eq(sum, hn::Zero(d)));
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

void GridHqq(const float* x, int64_t n, int64_t group, const GridRule& rule, const GridLines& lines,
             float* zeros, double* errors) {
  const float top = top_code(rule.bits);
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
      sums.shrinks = sums.shrinks && rule.shrinks;
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

#if HWY_TARGET == HWY_SCALAR

int64_t GridEncodeBlocks(const float*, int64_t, int64_t, int, const float*, const float*, const PackedSpan&,
                         uint8_t*) {
  return 0;
}

#else

constexpr int64_t kBlock = 256;  // codes: whole blocks of every plane
constexpr int kWordLanes = 8;
constexpr int kStep = std::max(kWidth, kWordLanes);  // codes that go into words at once
constexpr int kParts = kStep / kWidth;

// The line of the group that a number is in, for numbers that are met from the last to the first.
struct Descent {
  const float* inv;
  const float* zero;
  int64_t group;
  int64_t left;  // numbers of the group up to here
  Float inverse, zeros;

  HWY_INLINE Descent(const float* inv_of, const float* zero_of, int64_t n, int64_t size)
      : inv(inv_of + (n - 1) / size), zero(zero_of + (n - 1) / size), group(size), left((n - 1) % size + 1) {
    set();
  }
  HWY_INLINE void set() {
    inverse = hn::Set(Floats(), *inv);
    zeros = hn::Set(Floats(), *zero);
  }
  HWY_INLINE void pass(int64_t numbers) {
    left -= numbers;
    if (left > 0) return;
    left = group;
    --inv, --zero;
  }
};

// The words of a plane, as packing.hpp has them: word i holds codes i, i + 8, ... of the block, the first in
// its lowest bits. Steps come from the last to the first, so that every word is shifted by as much each time.
template <int P, int kShift>
struct Words {
  static constexpr int kBits = P * kStep / kWordLanes;  // of a word and step
  static constexpr int kSteps = 32 / kBits;
  hn::Vec<Ints> words[kParts];

  // Not left to the compiler, which would make it for no target in particular.
  HWY_INLINE Words() {
    for (int v = 0; v < kParts; ++v) words[v] = hn::Zero(Ints());
  }

  HWY_INLINE void add(const hn::Vec<Ints> (&codes)[kParts], int step, uint8_t* HWY_RESTRICT plane) {
    const Ints ints;
    const auto mask = hn::Set(ints, (1 << P) - 1);
    for (int v = 0; v < kParts; ++v) {
      const auto field = hn::And(hn::ShiftRight<kShift>(codes[v]), mask);
      words[v] = (step + 1) % kSteps == 0 ? field : hn::Or(ShiftedUp(words[v]), field);
    }
    if (step % kSteps == 0) store(plane + step / kSteps * 32);
  }

 private:
  // In a step of 16 codes the upper lanes have the codes that follow those of the lower ones.
  HWY_INLINE static hn::Vec<Ints> ShiftedUp(hn::Vec<Ints> x) {
    if constexpr (kBits < 32)
      return hn::ShiftLeft<kBits>(x);
    else
      return x;
  }
  HWY_INLINE void store(uint8_t* to) const {
    const Ints ints;
    if constexpr (kWidth == 16) {
      const hn::Half<Ints> half;
      const auto joined =
          hn::Or(hn::LowerHalf(half, words[0]), hn::ShiftLeft<P>(hn::UpperHalf(half, words[0])));
      hn::StoreU(joined, half, reinterpret_cast<int32_t*>(to));
    } else {
      for (int v = 0; v < kParts; ++v)
        hn::StoreU(words[v], ints, reinterpret_cast<int32_t*>(to) + v * kWidth);
    }
  }
};

template <int kBits>
int64_t EncodeBlocks(const float* HWY_RESTRICT x, int64_t n, int64_t group, const float* HWY_RESTRICT inv,
                     const float* HWY_RESTRICT zero, const PackedSpan& span, uint8_t* HWY_RESTRICT row) {
  const Floats d;
  const Ints ints;
  const Float rounder = hn::Set(d, kRounder), top = hn::Set(d, top_code(kBits));
  const int64_t plane_unit = (span.cols + 7) / 8;
  // Planes of 8, 4, 2 and 1 bits, the highest bits first.
  uint8_t* const plane4 = row + 4 * span.begin / 8;
  uint8_t* const plane2 = row + (kBits & 4) * plane_unit + 2 * span.begin / 8;
  uint8_t* const plane1 = row + (kBits & 6) * plane_unit + span.begin / 8;
  const int64_t blocks = n / kBlock;
  if (blocks == 0) return 0;
  const float* const next = x + n + n / 2;
  Descent line(inv, zero, blocks * kBlock, group);
  for (int64_t b = blocks - 1; b >= 0; --b) {
    const float* const source = x + b * kBlock;
    Words<8, 0> eight;
    Words<4, kBits & 3> four;
    Words<2, kBits & 1> two;
    Words<1, 0> one;
    HWY_UNROLL(1)
    for (int step = static_cast<int>(kBlock) / kStep - 1; step >= 0; --step) {
      if (step % 2 == 0) __builtin_prefetch(next + (b * kBlock + step * kStep) / 2, 0, 2);
      line.set();  // here, since behind the last step there is no group to read
      hn::Vec<Ints> codes[kParts];
      for (int v = 0; v < kParts; ++v) {
        const float* const at = source + step * kStep + v * kWidth;
        const Float scaled = hn::Add(hn::Mul(hn::LoadU(d, at), line.inverse), line.zeros);
        const Float code = hn::Min(hn::Max(scaled, hn::Zero(d)), top);
        codes[v] = hn::BitCast(ints, hn::Add(code, rounder));
      }
      if constexpr (kBits == 8) eight.add(codes, step, row + span.begin + b * kBlock);
      if constexpr ((kBits & 4) != 0) four.add(codes, step, plane4 + b * (kBlock / 2));
      if constexpr ((kBits & 2) != 0) two.add(codes, step, plane2 + b * (kBlock / 4));
      if constexpr ((kBits & 1) != 0) one.add(codes, step, plane1 + b * (kBlock / 8));
      line.pass(kStep);
    }
  }
  return blocks * kBlock;
}

int64_t GridEncodeBlocks(const float* x, int64_t n, int64_t group, int bits, const float* inv,
                         const float* zero, const PackedSpan& span, uint8_t* row) {
  if (group % kStep != 0) return 0;
  switch (bits) {
    case 1:
      return EncodeBlocks<1>(x, n, group, inv, zero, span, row);
    case 2:
      return EncodeBlocks<2>(x, n, group, inv, zero, span, row);
    case 3:
      return EncodeBlocks<3>(x, n, group, inv, zero, span, row);
    case 4:
      return EncodeBlocks<4>(x, n, group, inv, zero, span, row);
    case 5:
      return EncodeBlocks<5>(x, n, group, inv, zero, span, row);
    case 6:
      return EncodeBlocks<6>(x, n, group, inv, zero, span, row);
    case 7:
      return EncodeBlocks<7>(x, n, group, inv, zero, span, row);
    default:
      return EncodeBlocks<8>(x, n, group, inv, zero, span, row);
  }
}

#endif

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
  table.grid_encode_blocks = GridEncodeBlocks;
  table.grid_decode = GridDecode;
}

}  // namespace
}  // namespace quantrature::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
QUANTRATURE_EXPORT_KERNELS(grid)
#endif
