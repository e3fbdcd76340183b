// Gathering is written out in vectors: few elements pass, so most blocks cost one comparison and no more. The
// histogram stays the reference: its increments, one by one, are what limits it.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/topk/topk_simd.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "runtime/simd_kernels.hpp"

HWY_BEFORE_NAMESPACE();
namespace quantrature::HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

using Floats = hn::ScalableTag<float>;
using Float = hn::Vec<Floats>;
using Mask = hn::Mask<Floats>;

constexpr int kBlockVectors = 4;

template <bool kByAbs>
HWY_INLINE Mask Below(const Float x, const Float low) {
  if constexpr (kByAbs) return hn::Lt(hn::Abs(x), low);
  return hn::Lt(x, low);
}

template <bool kByAbs>
int64_t Gather(const float* x, int64_t n, float low, float* values, uint32_t* offsets) {
  const Floats f;
  const int64_t width = static_cast<int64_t>(hn::Lanes(f));
  const int64_t block = kBlockVectors * width;
  const Float bound = hn::Set(f, low);
  int64_t count = 0;
  int64_t i = 0;
  for (; i + block <= n; i += block) {
    Mask below[kBlockVectors];
    for (int v = 0; v < kBlockVectors; ++v) below[v] = Below<kByAbs>(hn::LoadU(f, x + i + v * width), bound);
    const Mask all = hn::And(hn::And(below[0], below[1]), hn::And(below[2], below[3]));
    if (HWY_LIKELY(hn::AllTrue(f, all))) continue;
    for (int v = 0; v < kBlockVectors; ++v) {
      uint8_t bytes[8] = {};
      hn::StoreMaskBits(f, hn::Not(below[v]), bytes);
      uint64_t bits = 0;
      for (int b = 0; b < 8; ++b) bits |= static_cast<uint64_t>(bytes[b]) << (8 * b);
      for (; bits != 0; bits &= bits - 1) {
        const int64_t at = i + v * width + static_cast<int64_t>(hwy::Num0BitsBelowLS1Bit_Nonzero64(bits));
        values[count] = x[at];
        offsets[count++] = static_cast<uint32_t>(at);
      }
    }
  }
  for (; i < n; ++i) {
    if (score_of(x[i], kByAbs) < low) continue;
    values[count] = x[i];
    offsets[count++] = static_cast<uint32_t>(i);
  }
  return count;
}

int64_t TopkGather(const float* x, int64_t n, bool by_abs, float low, float* values, uint32_t* offsets) {
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
