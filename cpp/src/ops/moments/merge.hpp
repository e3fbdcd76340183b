// Moments of the union of two sets from those of each (Chan et al. 1983, Pebay 2008), on the host and on
// devices.
#pragma once

#include <algorithm>

#include "common/half.hpp"
#include "quantrature/moments.hpp"

namespace quantrature {

QUANTRATURE_INLINE Moments merged(const Moments& a, const Moments& b) {
  if (a.count == 0) return b;
  if (b.count == 0) return a;
  Moments r{};
  const double n = r.count = a.count + b.count;
  const double d = b.mean - a.mean;
  const double d_n = d / n;
  const double ab = a.count * b.count;
  r.mean = a.mean + d_n * b.count;
  r.m2 = a.m2 + b.m2 + d * d_n * ab;
  r.m3 = a.m3 + b.m3 + d * d_n * d_n * ab * (a.count - b.count) + 3 * d_n * (a.count * b.m2 - b.count * a.m2);
  r.m4 = a.m4 + b.m4 + d * d_n * d_n * d_n * ab * (a.count * a.count - ab + b.count * b.count) +
         6 * d_n * d_n * (a.count * a.count * b.m2 + b.count * b.count * a.m2) +
         4 * d_n * (a.count * b.m3 - b.count * a.m3);
  r.minimum = std::min(a.minimum, b.minimum);
  r.maximum = std::max(a.maximum, b.maximum);
  return r;
}

}  // namespace quantrature
