// Written out in vectors. The costs of the overlaps alone are kept, 2^(state_bits - step_bits) numbers of 16
// bits, which fit the nearest cache; each is spread over the states that follow from it, and no pointer back
// is written: the walk is found again from the costs. What is left is to read the values of all states, from
// the second cache at 16 state bits, and five operations on as many states as a vector has.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/viterbi/viterbi_simd.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "ops/viterbi/cost.hpp"
#include "runtime/simd_kernels.hpp"

HWY_BEFORE_NAMESPACE();
namespace quantrature::HWY_NAMESPACE {
namespace {

#if HWY_TARGET != HWY_SCALAR

namespace hn = hwy::HWY_NAMESPACE;

using Costs = hn::CappedTag<uint16_t, 32>;
using Values = hn::RebindToSigned<Costs>;
using Cost = hn::Vec<Costs>;
constexpr int kWidth = static_cast<int>(hn::MaxLanes(Costs()));

// Each of kWidth / 2^kStepBits costs, repeated 2^kStepBits times; one cost repeated if that is less than one.
template <int kStepBits>
struct Spread {
  static constexpr int kRepeat = 1 << kStepBits;
  hn::Vec<hn::Repartition<uint8_t, Costs>> pattern;

  HWY_INLINE Spread() {
    HWY_ALIGN uint8_t bytes[2 * kWidth];
    for (int i = 0; i < kWidth; ++i)
      for (int b = 0; b < 2; ++b) bytes[2 * i + b] = static_cast<uint8_t>(2 * (i / kRepeat % 8) + b);
    pattern = hn::Load(hn::Repartition<uint8_t, Costs>(), bytes);
  }

  HWY_INLINE Cost operator()(const uint16_t* HWY_RESTRICT costs) const {
    const Costs d;
    if constexpr (kRepeat >= kWidth) {
      return hn::Set(d, *costs);
    } else if constexpr (kRepeat == 2 && kWidth > 16) {
      const hn::RepartitionToWide<Costs> wide;
      const auto once = hn::PromoteTo(wide, hn::LoadU(hn::Half<Costs>(), costs));
      return hn::BitCast(d, hn::Or(once, hn::ShiftLeft<16>(once)));
    } else {
      return hn::TableLookupBytes(hn::LoadDup128(d, costs), hn::BitCast(d, pattern));
    }
  }
};

template <int kStepBits, int kPerStep>
uint16_t StepOf(const ViterbiStep& s) {
  const Costs d;
  const Values i;
  const Spread<kStepBits> spread;
  const auto x0 = hn::Set(i, s.x[0]);
  const auto x1 = hn::Set(i, s.x[1]);
  const Cost common = hn::Set(d, s.common);
  Cost least = hn::Set(d, uint16_t{65535});
  const uint16_t* HWY_RESTRICT from = s.from;
  for (int block = 0; block < 1 << s.overlap_bits; block += kViterbiBlock)
    for (int u = block; u < block + kViterbiBlock; u += kWidth) {
      const int place = (block << kStepBits) * kPerStep + u - block;
      Cost best = hn::Set(d, uint16_t{65535});
      for (int j = 0; j < 1 << kStepBits; ++j) {
        const int at = place + j * kPerStep * kViterbiBlock;
        const auto d0 = hn::SaturatedSub(x0, hn::LoadU(i, s.values[0] + at));
        auto distance = hn::MulFixedPoint15(d0, d0);
        if constexpr (kPerStep == 2) {
          const auto d1 = hn::SaturatedSub(x1, hn::LoadU(i, s.values[1] + at));
          distance = hn::Add(distance, hn::MulFixedPoint15(d1, d1));
        }
        const Cost before = spread(from + (((j << s.overlap_bits) + u) >> kStepBits));
        best = hn::Min(best, hn::SaturatedAdd(before, hn::BitCast(d, distance)));
      }
      best = hn::SaturatedSub(best, common);
      hn::StoreU(best, d, s.to + u);
      least = hn::Min(least, best);
    }
  return hn::GetLane(hn::MinOfLanes(d, least));
}

template <int kPerStep>
uint16_t StepOfWeights(const ViterbiStep& s) {
  switch (s.step_bits) {
    case 1:
      return StepOf<1, kPerStep>(s);
    case 2:
      return StepOf<2, kPerStep>(s);
    case 3:
      return StepOf<3, kPerStep>(s);
    case 4:
      return StepOf<4, kPerStep>(s);
    case 6:
      return StepOf<6, kPerStep>(s);
    default:
      return StepOf<8, kPerStep>(s);
  }
}

uint16_t Step(const ViterbiStep& s) {
  if (1 << s.overlap_bits < kViterbiBlock) return plain_step(s);
  return s.per_step == 1 ? StepOfWeights<1>(s) : StepOfWeights<2>(s);
}

#endif

void FillKernels(KernelTable& table) {
#if HWY_TARGET == HWY_SCALAR
  static_cast<void>(table);
#else
  table.viterbi_step = Step;
#endif
}

}  // namespace
}  // namespace quantrature::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
QUANTRATURE_EXPORT_KERNELS(viterbi)
#endif
