#include <algorithm>
#include <cmath>

#include "ops/grid/line.hpp"
#include "runtime/reference.hpp"

namespace quantrature::reference {
namespace {

constexpr int kLanes = 16;

float add_lanes(float (&lanes)[kLanes]) {
  for (int apart = kLanes / 2; apart > 0; apart /= 2)
    for (int i = 0; i < apart; ++i) lanes[i] += lanes[i + apart];
  return lanes[0];
}

float code_of(float x, float inv, float zero, float top) {
  return std::clamp(std::nearbyint(x * inv + zero), 0.0f, top);
}

float squared_error(const float* x, int64_t n, const GridLine& line, float top) {
  float sum[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) {
    const float apart = x[i] - (code_of(x[i], line.inv, line.zero, top) - line.zero) * line.scale;
    sum[i % kLanes] += apart * apart;
  }
  return add_lanes(sum);
}

GridLine least_squared_error(const float* x, int64_t n, float lo, float hi, const GridRule& rule) {
  const float top = top_code(rule.bits);
  GridLine best = line_of_range(lo, hi, rule);
  if (best.inv == 0) return best;
  float least = squared_error(x, n, best, top);
  for (int i = 1; i < kMseCandidates; ++i) {
    const GridLine line = line_of_range(lo * shrink_factor(i), hi * shrink_factor(i), rule);
    const float error = squared_error(x, n, line, top);
    if (error < least) best = line, least = error;
  }
  return best;
}

bool grid_fit(const float* x, int64_t n, int64_t group, const GridRule& rule,
              const GridLines& lines) noexcept {
  bool finite = true;
  for (int64_t g = 0, begin = 0; begin < n; ++g, begin += group) {
    const int64_t size = std::min(group, n - begin);
    float lo = x[begin], hi = x[begin];
    for (int64_t i = begin; i < begin + size; ++i) {
      finite = finite && std::isfinite(x[i]);
      lo = std::min(lo, x[i]);
      hi = std::max(hi, x[i]);
    }
    finite = finite && range_is_finite(lo, hi, rule.sym);
    if (!finite) return false;
    const GridLine line =
        rule.mse ? least_squared_error(x + begin, size, lo, hi, rule) : line_of_range(lo, hi, rule);
    lines.inv[g] = line.inv;
    lines.zero[g] = line.zero;
    lines.scale[g] = line.scale;
  }
  return true;
}

// zeros: those after each iteration, group by group. errors: the sum of |d| in each iteration.
void grid_hqq(const float* x, int64_t n, int64_t group, const GridRule& rule, const GridLines& lines,
              float* zeros, double* errors) noexcept {
  const float top = top_code(rule.bits);
  std::fill_n(errors, kHqqIterations, 0.0);
  for (int64_t g = 0, begin = 0; begin < n; ++g, begin += group, zeros += kHqqIterations) {
    const int64_t size = std::min(group, n - begin);
    const float inv = lines.inv[g], scale = lines.scale[g];
    float zero = lines.zero[g];
    if (inv == 0) {
      std::fill_n(zeros, kHqqIterations, zero);
      continue;
    }
    double beta = 10;
    for (int iteration = 0; iteration < kHqqIterations; ++iteration) {
      float shifts[kLanes] = {}, distances[kLanes] = {};
      for (int64_t i = 0; i < size; ++i) {
        const float w = x[begin + i];
        const float q = code_of(w, inv, zero, top);
        const float d = w - (q - zero) * scale;
        shifts[i % kLanes] += q - (w - (rule.shrinks ? shrink(d, beta) : 0)) * inv;
        distances[i % kLanes] += std::abs(d);
      }
      zero = add_lanes(shifts) / static_cast<float>(size);
      errors[iteration] += static_cast<double>(add_lanes(distances));
      zeros[iteration] = zero;
      beta *= 1.01;
    }
  }
}

void grid_encode(const float* x, int64_t n, int64_t group, int bits, const float* inv, const float* zero,
                 uint8_t* codes) noexcept {
  for (int64_t i = 0; i < n; ++i)
    codes[i] = static_cast<uint8_t>(code_of(x[i], inv[i / group], zero[i / group], top_code(bits)));
}

// None: the caller encodes and packs one after the other, which is what a fast kernel has to come to.
int64_t grid_encode_blocks(const float*, int64_t, int64_t, int, const float*, const float*, const PackedSpan&,
                           uint8_t*) noexcept {
  return 0;
}

void grid_decode(const uint8_t* codes, int64_t n, int64_t group, const float* zero, const float* scale,
                 float* out) noexcept {
  for (int64_t i = 0; i < n; ++i)
    out[i] = (static_cast<float>(codes[i]) - zero[i / group]) * scale[i / group];
}

}  // namespace

void fill_grid(KernelTable& table) {
  table.grid_fit = grid_fit;
  table.grid_hqq = grid_hqq;
  table.grid_encode = grid_encode;
  table.grid_encode_blocks = grid_encode_blocks;
  table.grid_decode = grid_decode;
}

}  // namespace quantrature::reference
