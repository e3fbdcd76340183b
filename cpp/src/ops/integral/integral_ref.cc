#include <cmath>

#include "runtime/reference.hpp"

namespace quantrature::reference {
namespace {

constexpr int kLanes = 16;

void pqi_accumulate(float* acc, const float* grad, float weight, int64_t n) noexcept {
  for (int64_t i = 0; i < n; ++i) acc[i] += weight * grad[i];
}

void pqi_finalize(const float* acc, const float* w, const float* w_quantized, bool keep_sign, float* out,
                  int64_t n) noexcept {
  for (int64_t i = 0; i < n; ++i) {
    const float share = (w_quantized[i] - w[i]) * acc[i];
    out[i] = keep_sign ? share : std::abs(share);
  }
}

// Element i adds to lane i mod 16; then lanes 8 apart are added, then 4, 2 and 1 apart.
double pqi_sum(const float* acc, const float* w, const float* w_quantized, int64_t n) noexcept {
  double lanes[kLanes] = {};
  for (int64_t i = 0; i < n; ++i)
    lanes[i % kLanes] +=
        (static_cast<double>(w_quantized[i]) - static_cast<double>(w[i])) * static_cast<double>(acc[i]);
  for (int apart = kLanes / 2; apart > 0; apart /= 2)
    for (int i = 0; i < apart; ++i) lanes[i] += lanes[i + apart];
  return lanes[0];
}

void interpolate(const float* w, const float* w_quantized, float t, float* out, int64_t n) noexcept {
  for (int64_t i = 0; i < n; ++i) out[i] = w[i] + t * (w_quantized[i] - w[i]);
}

}  // namespace

void fill_integral(KernelTable& table) {
  table.pqi_accumulate = pqi_accumulate;
  table.pqi_finalize = pqi_finalize;
  table.pqi_sum = pqi_sum;
  table.interpolate = interpolate;
}

}  // namespace quantrature::reference
