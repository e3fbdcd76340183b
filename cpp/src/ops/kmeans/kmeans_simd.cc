// Written out in vectors, because the compiler does not vectorise where a minimum is. Dividing limits both:
// one in a lane for each pair of a begin and an end.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/kmeans/kmeans_simd.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <limits>

#include "ops/kmeans/sums.hpp"
#include "runtime/simd_kernels.hpp"

HWY_BEFORE_NAMESPACE();
namespace quantrature::HWY_NAMESPACE {
namespace {

#if HWY_TARGET != HWY_SCALAR && HWY_HAVE_FLOAT64

namespace hn = hwy::HWY_NAMESPACE;

using Doubles = hn::CappedTag<double, kKmeansEnds>;
using Vector = hn::Vec<Doubles>;

HWY_INLINE Vector Cost(Vector best, Vector first, Vector second, Vector weight) {
  const Vector cost = hn::Sub(second, hn::Div(hn::Mul(first, first), weight));
  return hn::Add(best, hn::IfThenElseZero(hn::Gt(cost, hn::Zero(Doubles())), cost));
}

// Begins are in lanes.
int64_t Begin(const KmeansSums& s, int64_t first, int64_t last, int64_t end, double* least) {
  const Doubles d;
  const int64_t width = static_cast<int64_t>(hn::Lanes(d));
  const Vector end_weight = hn::Set(d, s.weight[end]);
  const Vector end_first = hn::Set(d, s.first[end]);
  const Vector end_second = hn::Set(d, s.second[end]);
  const Vector infinity = hn::Set(d, std::numeric_limits<double>::infinity());
  const Vector step = hn::Set(d, static_cast<double>(width));
  Vector places = hn::Iota(d, static_cast<double>(first));
  Vector lowest = infinity;
  Vector at = hn::Set(d, static_cast<double>(first));
  const auto cost_of = [&](int64_t begin) HWY_ATTR {
    return Cost(hn::LoadU(d, s.best + begin), hn::Sub(end_first, hn::LoadU(d, s.first + begin)),
                hn::Sub(end_second, hn::LoadU(d, s.second + begin)),
                hn::Sub(end_weight, hn::LoadU(d, s.weight + begin)));
  };
  int64_t begin = first;
  for (; begin + width <= last + 1; begin += width) {
    const Vector cost = cost_of(begin);
    const auto less = hn::Lt(cost, lowest);
    lowest = hn::IfThenElse(less, cost, lowest);
    at = hn::IfThenElse(less, places, at);
    places = hn::Add(places, step);
  }
  if (begin <= last) {
    const auto inside = hn::FirstN(d, static_cast<size_t>(last + 1 - begin));
    const Vector cost = hn::IfThenElse(inside, cost_of(begin), infinity);
    const auto less = hn::Lt(cost, lowest);
    lowest = hn::IfThenElse(less, cost, lowest);
    at = hn::IfThenElse(less, places, at);
  }
  const Vector minimum = hn::MinOfLanes(d, lowest);
  *least = hn::GetLane(minimum);
  return static_cast<int64_t>(
      hn::GetLane(hn::MinOfLanes(d, hn::IfThenElse(hn::Eq(lowest, minimum), at, infinity))));
}

// Ends are in lanes.
void Begins(const KmeansSums& s, int64_t first, int64_t last, int64_t end, double price, double* least,
            int32_t* begins) {
  const Doubles d;
  const hn::Rebind<int32_t, Doubles> narrow;
  const int64_t width = static_cast<int64_t>(hn::Lanes(d));
  for (int64_t i = 0; i < kKmeansEnds; i += width) {
    const Vector end_weight = hn::LoadU(d, s.weight + end + i);
    const Vector end_first = hn::LoadU(d, s.first + end + i);
    const Vector end_second = hn::LoadU(d, s.second + end + i);
    Vector lowest = hn::Set(d, std::numeric_limits<double>::infinity());
    Vector at = hn::Set(d, static_cast<double>(first));
    for (int64_t begin = first; begin <= last; ++begin) {
      const Vector cost = Cost(hn::Set(d, s.best[begin]), hn::Sub(end_first, hn::Set(d, s.first[begin])),
                               hn::Sub(end_second, hn::Set(d, s.second[begin])),
                               hn::Sub(end_weight, hn::Set(d, s.weight[begin])));
      const auto less = hn::Lt(cost, lowest);
      lowest = hn::IfThenElse(less, cost, lowest);
      at = hn::IfThenElse(less, hn::Set(d, static_cast<double>(begin)), at);
    }
    hn::StoreU(hn::Add(lowest, hn::Set(d, price)), d, least + i);
    hn::StoreU(hn::DemoteTo(narrow, at), narrow, begins + i);
  }
}

#endif

void FillKernels(KernelTable& table) {
#if HWY_TARGET == HWY_SCALAR || !HWY_HAVE_FLOAT64
  static_cast<void>(table);
#else
  table.kmeans_begin = Begin;
  table.kmeans_begins = Begins;
#endif
}

}  // namespace
}  // namespace quantrature::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
QUANTRATURE_EXPORT_KERNELS(kmeans)
#endif
