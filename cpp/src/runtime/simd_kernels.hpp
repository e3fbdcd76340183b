// fill_<op>(target, table) overwrites the reference kernels of an op with those that one Highway target has.
#pragma once

#include <cstdint>

#include "runtime/kernels.hpp"

namespace quantrature::simd {

#define QUANTRATURE_OP(op) void fill_##op(int64_t target, KernelTable& table);
#define QUANTRATURE_KERNEL(name, ...)
#include "runtime/kernels.inc"
#undef QUANTRATURE_KERNEL
#undef QUANTRATURE_OP

}  // namespace quantrature::simd

// For the HWY_ONCE part of an <op>_simd.cc whose per-target namespace has FillKernels(KernelTable&): defines
// simd::fill_<op>, which calls the FillKernels of the asked target without touching Highway's process-wide
// choice.
#define QUANTRATURE_EXPORT_KERNELS(op)                                          \
  namespace quantrature {                                                       \
  HWY_EXPORT(FillKernels);                                                      \
  void simd::fill_##op(int64_t target, KernelTable& table) {                    \
    hwy::ChosenTarget chosen;                                                   \
    chosen.Update(target);                                                      \
    constexpr bool one_target = (HWY_TARGETS & (HWY_TARGETS - 1)) == 0;         \
    HWY_DISPATCH_TABLE(FillKernels)[one_target ? 0 : chosen.GetIndex()](table); \
  }                                                                             \
  }
