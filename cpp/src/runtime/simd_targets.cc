#include "runtime/simd_targets.hpp"

#include <hwy/highway.h>

#include "runtime/simd_kernels.hpp"

namespace quantrature {

std::vector<Target> simd_targets(const KernelTable& reference) {
  std::vector<Target> targets;
  for (int64_t mask : hwy::SupportedAndGeneratedTargets()) {
    Target target{hwy::TargetName(mask), reference};
#define QUANTRATURE_OP(op) simd::fill_##op(mask, target.kernels);
#define QUANTRATURE_KERNEL(name, ...)
#include "runtime/kernels.inc"
#undef QUANTRATURE_KERNEL
#undef QUANTRATURE_OP
    // Highway numbers its targets from the best one down.
    targets.insert(targets.begin(), target);
  }
  return targets;
}

}  // namespace quantrature
