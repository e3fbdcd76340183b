#include "runtime/reference.hpp"

namespace quantrature::reference {
namespace {

// Values and offsets, in order, of the elements whose score is at least low, and of every NaN; returns how
// many.
int64_t topk_gather(const float* x, int64_t n, bool by_abs, float low, float* values,
                    uint16_t* offsets) noexcept {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (score_of(x[i], by_abs) < low) continue;
    values[count] = x[i];
    offsets[count++] = static_cast<uint16_t>(i);
  }
  return count;
}

void topk_histogram(const float* x, int64_t n, bool by_abs, const KeyDigit& digit,
                    uint32_t* counts) noexcept {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t key = ordered_key(score_of(x[i], by_abs));
    if (digit.has(key)) ++counts[digit.of(key)];
  }
}

}  // namespace

void fill_topk(KernelTable& table) {
  table.topk_gather = topk_gather;
  table.topk_histogram = topk_histogram;
}

}  // namespace quantrature::reference
