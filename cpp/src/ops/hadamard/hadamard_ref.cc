#include "runtime/reference.hpp"

namespace quantrature::reference {
namespace {

// The Walsh-Hadamard transform of 2^k numbers, not scaled.
void hadamard_sylvester(float* x, int64_t n) {
  for (int64_t half = 1; half < n; half *= 2)
    for (int64_t i = 0; i < n; ++i)
      if ((i & half) == 0) {
        const float a = x[i], b = x[i + half];
        x[i] = a + b;
        x[i + half] = a - b;
      }
}

// out[c, i] = sum over b of factor[b, c] x[b, i], summed in order; x has order x block numbers.
void hadamard_factor(const float* x, int64_t order, const float* factor, int64_t block, float* out) {
  for (int64_t c = 0; c < order; ++c)
    for (int64_t i = 0; i < block; ++i) {
      float sum = factor[c] * x[i];
      for (int64_t b = 1; b < order; ++b) sum += factor[b * order + c] * x[b * block + i];
      out[c * block + i] = sum;
    }
}

}  // namespace

void fill_hadamard(KernelTable& table) {
  table.hadamard_sylvester = hadamard_sylvester;
  table.hadamard_factor = hadamard_factor;
}

}  // namespace quantrature::reference
