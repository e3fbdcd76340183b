#include <algorithm>
#include <cmath>

#include "runtime/reference.hpp"

namespace quantrature::reference {
namespace {

void gptq_columns(const GptqColumns& c) {
  const float top = static_cast<float>((1 << c.bits) - 1);
  for (int k = 0; k < c.count; ++k) {
    for (int r = 0; r < kGptqRows; ++r) {
      float& x = c.sums[k * kGptqRows + r];
      float& w = c.errors[k * c.stride + r];
      const float inv = c.inv[k][r], zero = c.zero[k][r], scale = c.scale[k][r];
      const bool exact = (c.exact[k] >> r & 1) != 0;
      const float at = (exact ? w : x) * inv + zero;
      const float code = std::min(std::max(0.0f, std::nearbyint(at)), top);  // NaN becomes 0
      const float value = exact ? w : (code - zero) * scale;
      c.codes[k * kGptqRows + r] = static_cast<uint8_t>(code);
      x -= value;
      w -= value;
      for (int next = k + 1; next < c.count; ++next)
        c.sums[next * kGptqRows + r] =
            std::fma(w, c.feedback[k * kGptqColumns + next], c.sums[next * kGptqRows + r]);
    }
  }
}

}  // namespace

void fill_gptq(KernelTable& table) {
  table.gptq_columns = gptq_columns;
}

}  // namespace quantrature::reference
