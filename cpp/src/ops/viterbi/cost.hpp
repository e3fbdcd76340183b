// The arithmetic of the search, one number at a time.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "common/half.hpp"
#include "ops/viterbi/step.hpp"

namespace quantrature {

// Units of a scale.
QUANTRATURE_INLINE double viterbi_unit(int bits) {
  return bits > 2 ? 8192 : 4096;
}

QUANTRATURE_INLINE int16_t in_units(double value) {
  return static_cast<int16_t>(std::clamp(std::nearbyint(value), -32767.0, 32767.0));
}

// x is a magnitude and value has the sign that x had taken off, so that the difference cannot reach -2^15.
QUANTRATURE_INLINE uint16_t squared_distance(int16_t value, int16_t x) {
  const int32_t d = std::min(x - value, 32767);
  return static_cast<uint16_t>((d * d + (1 << 14)) >> 15);
}

QUANTRATURE_INLINE uint16_t saturated_sum(uint32_t a, uint32_t b) {
  return static_cast<uint16_t>(std::min(a + b, 65535u));
}

QUANTRATURE_INLINE uint16_t state_distance(const ViterbiStep& s, uint32_t j, uint32_t u) {
  const uint32_t place = viterbi_place(s, j, u);
  uint32_t sum = 0;
  for (int v = 0; v < s.per_step; ++v) sum += squared_distance(s.values[v][place], s.x[v]);
  return static_cast<uint16_t>(sum);
}

// The cost of the walk that comes to overlap u over the state that begins with j.
QUANTRATURE_INLINE uint16_t cost_over(const ViterbiStep& s, uint32_t j, uint32_t u) {
  return saturated_sum(s.from[((j << s.overlap_bits) + u) >> s.step_bits], state_distance(s, j, u));
}

// Writes the costs after a step and returns the least.
QUANTRATURE_INLINE uint16_t plain_step(const ViterbiStep& s) {
  uint16_t least = 65535;
  for (uint32_t u = 0; u < 1u << s.overlap_bits; ++u) {
    uint16_t best = 65535;
    for (uint32_t j = 0; j < 1u << s.step_bits; ++j) best = std::min(best, cost_over(s, j, u));
    s.to[u] = best > s.common ? static_cast<uint16_t>(best - s.common) : uint16_t{0};
    least = std::min(least, s.to[u]);
  }
  return least;
}

}  // namespace quantrature
