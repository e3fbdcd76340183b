// Written out in vectors for the stores that pass the cache by: a plain copy of a large matrix reads what it
// writes over, and takes half as long again.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "common/copy_simd.cc"
#include <hwy/cache_control.h>
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cstring>

#include "runtime/simd_kernels.hpp"

HWY_BEFORE_NAMESPACE();
namespace quantrature::HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

void CopyPastCache(const void* in, void* out, int64_t bytes, const void* next) {
  const hn::ScalableTag<uint8_t> d;
  const auto width = static_cast<int64_t>(hn::Lanes(d));
  const uint8_t* from = static_cast<const uint8_t*>(in);
  uint8_t* to = static_cast<uint8_t*>(out);
  const auto beyond = static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) % static_cast<uintptr_t>(width));
  const int64_t head = std::min(beyond == 0 ? 0 : width - beyond, bytes);
  std::memcpy(to, from, static_cast<size_t>(head));
  int64_t i = head;
  for (; i + width <= bytes; i += width) {
    __builtin_prefetch(static_cast<const uint8_t*>(next) + i);
    hn::Stream(hn::LoadU(d, from + i), d, to + i);
  }
  std::memcpy(to + i, from + i, static_cast<size_t>(bytes - i));
  hwy::FlushStream();
}

void FillKernels(KernelTable& table) {
  table.copy_past_cache = CopyPastCache;
}

}  // namespace
}  // namespace quantrature::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
QUANTRATURE_EXPORT_KERNELS(copy)
#endif
