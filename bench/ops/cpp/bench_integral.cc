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

// At some distance from the weights.
Matrix images() {
  static const std::vector<float> values(weights().rbegin(), weights().rend());
  return Matrix{values.data(), kSide, kSide, kSide, QTR_F32};
}

Matrix readable(const MutableMatrix& m) {
  return Matrix{m.data, m.rows, m.cols, m.row_stride, m.dtype};
}

void accumulate(const Matrix& grad) {
  pqi_accumulate({sizeof(PqiAccumulateArgs), accumulator(), grad, 1e-3});
}

void finalize() {
  const MutableMatrix acc = accumulator();
  pqi_finalize({sizeof(PqiFinalizeArgs), readable(acc), weight_matrix(), images(), 0, acc});
}

void sum() {
  double total;
  pqi_sum({sizeof(PqiSumArgs), readable(accumulator()), weight_matrix(), images(), &total});
}

void step() {
  interpolate({sizeof(InterpolateArgs), weight_matrix(), images(), 0.5, accumulator()});
}

int f32 = for_every_target("pqi_accumulate/f32", kNumbers * 12, [] { accumulate(weight_matrix()); });
int bf16 = for_every_target("pqi_accumulate/bf16", kNumbers * 10, [] { accumulate(bf16_gradient()); });
int absolute = for_every_target("pqi_finalize", kNumbers * 16, finalize);
int total = for_every_target("pqi_sum", kNumbers * 12, sum);
int between = for_every_target("interpolate", kNumbers * 12, step);

}  // namespace
}  // namespace quantrature::bench
