// Written out in vectors: the compiler vectorises neither the search nor the look-up. Of up to 15 bounds each
// is compared with several vectors at once; more are searched in halves. Tables that fit into one or two
// vectors are looked up there, others in memory.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/codebook/codebook_simd.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "ops/codebook/search.hpp"
#include "runtime/simd_kernels.hpp"

HWY_BEFORE_NAMESPACE();
namespace quantrature::HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

using Floats = hn::CappedTag<float, 16>;
using Ints = hn::RebindToSigned<Floats>;
using Bytes = hn::Rebind<uint8_t, Floats>;
using Float = hn::Vec<Floats>;
using Int = hn::Vec<Ints>;
constexpr int kWidth = static_cast<int>(hn::MaxLanes(Floats()));
constexpr int kMost = 256;
constexpr int kFewBounds = 15;
constexpr int kTogether = 4;  // vectors

bool CodebookLargest(const float* HWY_RESTRICT x, int64_t n, int64_t group, float* HWY_RESTRICT largest) {
  const Floats d;
  Float odd = hn::Zero(d);  // gathers x - x, which is 0 but for what is not finite
  float odd_rest = 0;
  for (int64_t g = 0, begin = 0; begin < n; ++g, begin += group) {
    const int64_t end = std::min(begin + group, n);
    Float most = hn::Zero(d);
    int64_t i = begin;
    for (; i + kWidth <= end; i += kWidth) {
      const Float value = hn::LoadU(d, x + i);
      odd = hn::Or(odd, hn::Sub(value, value));
      most = hn::Max(most, hn::Abs(value));
    }
    float found = hn::GetLane(hn::MaxOfLanes(d, most));
    for (; i < end; ++i) {
      odd_rest += x[i] - x[i];
      found = std::max(found, std::abs(x[i]));
    }
    largest[g] = found;
  }
  return odd_rest == 0 && hn::AllTrue(d, hn::Eq(odd, hn::Zero(d)));
}

HWY_INLINE uint8_t Rank(float at, const CodebookSearch& search) {
  return static_cast<uint8_t>(std::lower_bound(search.bounds, search.bounds + search.count, at) -
                              search.bounds);
}

// Numbers [0, n) times inv; how many are done, the rest being short of a vector.
HWY_INLINE int64_t RankFew(const float* HWY_RESTRICT x, int64_t n, float inv, const CodebookSearch& search,
                           uint8_t* HWY_RESTRICT ranks) {
  const Floats d;
  const Ints ints;
  const Float factor = hn::Set(d, inv);
  int64_t i = 0;
  for (; i + kTogether * kWidth <= n; i += kTogether * kWidth) {
    Float at[kTogether];
    Int rank[kTogether];
    for (int v = 0; v < kTogether; ++v) {
      at[v] = hn::Mul(hn::LoadU(d, x + i + v * kWidth), factor);
      rank[v] = hn::Zero(ints);
    }
    for (int b = 0; b < search.count; ++b) {
      const Float bound = hn::Set(d, search.bounds[b]);
      for (int v = 0; v < kTogether; ++v)
        rank[v] = hn::Sub(rank[v], hn::BitCast(ints, hn::VecFromMask(d, hn::Lt(bound, at[v]))));
    }
    for (int v = 0; v < kTogether; ++v)
      hn::StoreU(hn::DemoteTo(Bytes(), rank[v]), Bytes(), ranks + i + v * kWidth);
  }
  for (; i + kWidth <= n; i += kWidth) {
    const Float at = hn::Mul(hn::LoadU(d, x + i), factor);
    Int rank = hn::Zero(ints);
    for (int b = 0; b < search.count; ++b)
      rank = hn::Sub(rank, hn::BitCast(ints, hn::VecFromMask(d, hn::Lt(hn::Set(d, search.bounds[b]), at))));
    hn::StoreU(hn::DemoteTo(Bytes(), rank), Bytes(), ranks + i);
  }
  return i;
}

// The same for up to 255 bounds, which are followed by infinities up to all of them.
HWY_INLINE int64_t RankMany(const float* HWY_RESTRICT x, int64_t n, float inv,
                            const float* HWY_RESTRICT bounds, int half, uint8_t* HWY_RESTRICT ranks) {
  const Floats d;
  const Ints ints;
  const Float factor = hn::Set(d, inv);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    const Float at = hn::Mul(hn::LoadU(d, x + i), factor);
    Int rank = hn::Zero(ints);
    for (int step = half; step > 0; step /= 2) {
      const Float bound = hn::GatherIndex(d, bounds + step - 1, rank);
      rank = hn::Add(rank, hn::IfThenElseZero(hn::RebindMask(ints, hn::Lt(bound, at)), hn::Set(ints, step)));
    }
    hn::StoreU(hn::DemoteTo(Bytes(), rank), Bytes(), ranks + i);
  }
  return i;
}

void CodebookEncode(const float* HWY_RESTRICT x, int64_t n, int64_t group, const float* HWY_RESTRICT inv,
                    const CodebookSearch& search, uint8_t* HWY_RESTRICT codes) {
  float bounds[kMost];
  int half = kMost / 2;
  const bool few = search.count <= kFewBounds;
  if (!few) {
    std::copy_n(search.bounds, search.count, bounds);
    std::fill(bounds + search.count, bounds + kMost, std::numeric_limits<float>::infinity());
    while (half > search.count) half /= 2;
  }
  for (int64_t g = 0, begin = 0; begin < n; ++g, begin += group) {
    const int64_t size = std::min(group, n - begin);
    const float factor = inv == nullptr ? 1.0f : inv[g];  // to multiply by 1 changes nothing
    int64_t i = few ? RankFew(x + begin, size, factor, search, codes + begin)
                    : RankMany(x + begin, size, factor, bounds, half, codes + begin);
    for (; i < size; ++i) codes[begin + i] = Rank(x[begin + i] * factor, search);
  }
  if (search.ranks_are_codes) return;
  for (int64_t i = 0; i < n; ++i) codes[i] = search.codes[codes[i]];
}

HWY_INLINE Int Widened(const uint8_t* codes) {
  return hn::PromoteTo(Ints(), hn::LoadU(Bytes(), codes));
}

// lookup(codes) gives the entries of a vector of codes.
template <class Lookup>
HWY_INLINE void Decode(const uint8_t* HWY_RESTRICT codes, int64_t n, int64_t group,
                       const float* HWY_RESTRICT table, const float* HWY_RESTRICT scale,
                       float* HWY_RESTRICT out, Lookup&& lookup) {
  const Floats d;
  for (int64_t g = 0, begin = 0; begin < n; ++g, begin += group) {
    const int64_t end = std::min(begin + group, n);
    const float factor = scale == nullptr ? 1.0f : scale[g];
    const Float factors = hn::Set(d, factor);
    int64_t i = begin;
    for (; i + kWidth <= end; i += kWidth)
      hn::StoreU(hn::Mul(lookup(Widened(codes + i)), factors), d, out + i);
    for (; i < end; ++i) out[i] = table[codes[i]] * factor;
  }
}

void CodebookDecode(const uint8_t* HWY_RESTRICT codes, int64_t n, int64_t group, int bits,
                    const float* HWY_RESTRICT table, const float* HWY_RESTRICT scale,
                    float* HWY_RESTRICT out) {
  const Floats d;
  const Ints ints;
  const int entries = 1 << bits;
  if (entries <= 2 * kWidth) {
    float padded[2 * kWidth] = {};
    std::copy_n(table, entries, padded);
    const Float low = hn::LoadU(d, padded), high = hn::LoadU(d, padded + kWidth);
    if (entries <= kWidth)
      return Decode(codes, n, group, table, scale, out, [&](Int code) HWY_ATTR {
        return hn::TableLookupLanes(low, hn::IndicesFromVec(d, code));
      });
    return Decode(codes, n, group, table, scale, out, [&](Int code) HWY_ATTR {
      const auto lane = hn::IndicesFromVec(d, hn::And(code, hn::Set(ints, kWidth - 1)));
      const auto beyond = hn::RebindMask(d, hn::Gt(code, hn::Set(ints, kWidth - 1)));
      return hn::IfThenElse(beyond, hn::TableLookupLanes(high, lane), hn::TableLookupLanes(low, lane));
    });
  }
  Decode(codes, n, group, table, scale, out,
         [&](Int code) HWY_ATTR { return hn::GatherIndex(d, table, code); });
}

void FillKernels(KernelTable& table) {
  table.codebook_largest = CodebookLargest;
  table.codebook_encode = CodebookEncode;
  table.codebook_decode = CodebookDecode;
}

}  // namespace
}  // namespace quantrature::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
QUANTRATURE_EXPORT_KERNELS(codebook)
#endif
