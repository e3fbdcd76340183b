#include "bench.hpp"

namespace quantrature::bench {
namespace {

constexpr int64_t kNumbers = kSide * kSide;

MutableMatrix accumulator() {
  static std::vector<float> acc(static_cast<size_t>(kNumbers));
  return MutableMatrix{acc.data(), kSide, kSide, kSide, QTR_F32};
}

Matrix bf16_gradient() {
  static const std::vector<uint16_t> bits(static_cast<size_t>(kNumbers), 0x3C23);
  return Matrix{bits.data(), kSide, kSide, kSide, QTR_BF16};
}

void accumulate(const Matrix& grad) {
  pqi_accumulate({sizeof(PqiAccumulateArgs), accumulator(), grad, 1e-3});
}

void finalize() {
  const MutableMatrix acc = accumulator();
  const Matrix sums{acc.data, acc.rows, acc.cols, acc.row_stride, acc.dtype};
  pqi_finalize({sizeof(PqiFinalizeArgs), sums, weight_matrix(), weight_matrix(), 0, acc});
}

int f32 = for_every_target("pqi_accumulate/f32", kNumbers * 12, [] { accumulate(weight_matrix()); });
int bf16 = for_every_target("pqi_accumulate/bf16", kNumbers * 10, [] { accumulate(bf16_gradient()); });
int absolute = for_every_target("pqi_finalize", kNumbers * 16, [] { finalize(); });

}  // namespace
}  // namespace quantrature::bench
