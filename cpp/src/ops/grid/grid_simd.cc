#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/grid/grid_simd.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "runtime/simd_kernels.hpp"

HWY_BEFORE_NAMESPACE();
namespace quantrature::HWY_NAMESPACE {
namespace {

void FillKernels(KernelTable&) {}

}  // namespace
}  // namespace quantrature::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
QUANTRATURE_EXPORT_KERNELS(grid)
#endif
