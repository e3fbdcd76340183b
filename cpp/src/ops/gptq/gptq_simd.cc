// Written out in vectors, whose lanes are rows: columns follow each other, rows do not.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/gptq/gptq_simd.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "runtime/simd_kernels.hpp"

HWY_BEFORE_NAMESPACE();
namespace quantrature::HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

using Floats = hn::CappedTag<float, kGptqRows>;
using Words = hn::RebindToUnsigned<Floats>;
using Float = hn::Vec<Floats>;
constexpr int64_t kWidth = static_cast<int64_t>(hn::MaxLanes(Floats()));

void ColumnsInTurn(const GptqColumns& c) {
  const Floats d;
  const Words words;
  const hn::Rebind<uint8_t, Floats> bytes;
  const hn::RebindToSigned<Floats> ints;
  const Float top = hn::Set(d, static_cast<float>((1 << c.bits) - 1));
  for (int64_t r = 0; r < kGptqRows; r += kWidth) {
    for (int k = 0; k < c.count; ++k) {
      const Float x = hn::LoadU(d, c.sums + k * kGptqRows + r), w = hn::LoadU(d, c.errors + k * c.stride + r);
      const Float zero = hn::LoadU(d, c.zero[k] + r);
      const auto bits = hn::Iota(words, 0);
      const auto mine = hn::Set(words, static_cast<uint32_t>(uint64_t{c.exact[k]} >> r));
      const auto exact =
          hn::RebindMask(d, hn::Ne(hn::And(mine, hn::Shl(hn::Set(words, 1u), bits)), hn::Zero(words)));
      const Float at = hn::Add(hn::Mul(hn::IfThenElse(exact, w, x), hn::LoadU(d, c.inv[k] + r)), zero);
      const Float near = hn::Round(at);
      const Float code = hn::Min(hn::IfThenElseZero(hn::Gt(near, hn::Zero(d)), near), top);  // NaN becomes 0
      const Float value =
          hn::IfThenElse(exact, w, hn::Mul(hn::Sub(code, zero), hn::LoadU(d, c.scale[k] + r)));
      hn::StoreU(hn::DemoteTo(bytes, hn::ConvertTo(ints, code)), bytes, c.codes + k * kGptqRows + r);
      const Float error = hn::Sub(w, value);
      hn::StoreU(hn::Sub(x, value), d, c.sums + k * kGptqRows + r);
      hn::StoreU(error, d, c.errors + k * c.stride + r);
      for (int next = k + 1; next < c.count; ++next) {
        float* sum = c.sums + next * kGptqRows + r;
        hn::StoreU(hn::MulAdd(error, hn::Set(d, c.feedback[k * kGptqColumns + next]), hn::LoadU(d, sum)), d,
                   sum);
      }
    }
  }
}

void FillKernels(KernelTable& table) {
  table.gptq_columns = ColumnsInTurn;
}

}  // namespace
}  // namespace quantrature::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
QUANTRATURE_EXPORT_KERNELS(gptq)
#endif
