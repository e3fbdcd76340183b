#include "bench.hpp"

namespace quantrature::bench {
namespace {

constexpr int64_t kNumbers = kSide * kSide;
constexpr int64_t kTop = kNumbers / 200;

void run(const Matrix& x, int64_t k) {
  static std::vector<int64_t> indices(static_cast<size_t>(kNumbers / 2));
  static std::vector<float> values(indices.size());
  topk({sizeof(TopkArgs), &x, 1, k, QTR_KEY_ABS, 0, indices.data(), values.data(), nullptr});
}

Matrix ties() {
  static const std::vector<float> x(static_cast<size_t>(kNumbers), 0.5f);
  return Matrix{x.data(), kSide, kSide, kSide, QTR_F32};
}

int sparse = for_every_target("topk/0.5_percent", kNumbers * 4, [] { run(weight_matrix(), kTop); });
int half = for_every_target("topk/50_percent", kNumbers * 4, [] { run(weight_matrix(), kNumbers / 2); });
int equal = for_every_target("topk/all_equal", kNumbers * 4, [] { run(ties(), kTop); });

}  // namespace
}  // namespace quantrature::bench
