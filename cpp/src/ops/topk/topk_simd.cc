// Gathering is written out in vectors, because the compiler does not vectorise it; reading limits it. The
// histogram stays the reference: its increments, one by one, are what limits it.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/topk/topk_simd.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <cstring>

#include "runtime/simd_kernels.hpp"

HWY_BEFORE_NAMESPACE();
namespace quantrature::HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

using Floats = hn::ScalableTag<float>;

constexpr int64_t kBlock = 64;      // elements, one bit each in a word
constexpr int64_t kAhead = 1024;    // elements, a page of memory
constexpr int64_t kMaxBlocks = 64;  // 4096 elements, the kSpan of topk.cc
constexpr int kWidth = static_cast<int>(hn::MaxLanes(Floats()));

template <bool kByAbs>
HWY_INLINE hn::Mask<Floats> Reaches(const float* x, const hn::Vec<Floats> low) {
  const auto value = hn::LoadU(Floats(), x);
  if constexpr (kByAbs) return hn::Not(hn::Lt(hn::Abs(value), low));
  return hn::Not(hn::Lt(value, low));
}

// Bit i tells of element i.
template <bool kByAbs>
HWY_INLINE uint64_t ReachingBits(const float* x, const hn::Vec<Floats> low) {
  uint8_t bytes[kBlock / 8 + 8];
  if constexpr (kWidth >= 8) {
    for (int64_t i = 0; i < kBlock; i += kWidth)
      hn::StoreMaskBits(Floats(), Reaches<kByAbs>(x + i, low), bytes + i / 8);
  } else {
    for (int64_t i = 0; i < kBlock; i += 8) {
      unsigned byte = 0;
      for (int lane = 0; lane < 8; lane += kWidth) {
        uint8_t part[8];
        hn::StoreMaskBits(Floats(), Reaches<kByAbs>(x + i + lane, low), part);
        byte |= static_cast<unsigned>(part[0]) << lane;
      }
      bytes[i / 8] = static_cast<uint8_t>(byte);
    }
  }
  uint64_t bits;
  std::memcpy(&bits, bytes, sizeof(bits));
  return bits;
}

// First all comparisons, then what they found: whether a block has anything is not to be predicted.
template <bool kByAbs>
int64_t Gather(const float* x, int64_t n, float low, float* values, uint16_t* offsets) {
  const auto bound = hn::Set(Floats(), low);
  uint64_t bits[kMaxBlocks + 1];
  uint32_t blocks[kMaxBlocks + 1];
  const int64_t whole = n / kBlock;
  int64_t hit = 0;
  for (int64_t b = 0; b < whole; ++b) {
    // Processors that fetch ahead by themselves stop at the end of a page.
    for (int64_t i = 0; i < kBlock; i += 16) __builtin_prefetch(x + b * kBlock + i + kAhead, 0, 2);
    bits[hit] = ReachingBits<kByAbs>(x + b * kBlock, bound);
    blocks[hit] = static_cast<uint32_t>(b * kBlock);
    hit += bits[hit] != 0;
  }
  int64_t count = 0;
  for (int64_t h = 0; h < hit; ++h) {
    uint64_t rest = bits[h];
    do {
      const uint32_t at = blocks[h] + static_cast<uint32_t>(hwy::Num0BitsBelowLS1Bit_Nonzero64(rest));
      values[count] = x[at];
      offsets[count++] = static_cast<uint16_t>(at);
      rest &= rest - 1;
    } while (rest != 0);
  }
  for (int64_t i = whole * kBlock; i < n; ++i) {
    if (score_of(x[i], kByAbs) < low) continue;
    values[count] = x[i];
    offsets[count++] = static_cast<uint16_t>(i);
  }
  return count;
}

int64_t TopkGather(const float* x, int64_t n, bool by_abs, float low, float* values, uint16_t* offsets) {
  return by_abs ? Gather<true>(x, n, low, values, offsets) : Gather<false>(x, n, low, values, offsets);
}

void FillKernels(KernelTable& table) {
  table.topk_gather = TopkGather;
}

}  // namespace
}  // namespace quantrature::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
QUANTRATURE_EXPORT_KERNELS(topk)
#endif
