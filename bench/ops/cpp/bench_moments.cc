#include "bench.hpp"

namespace quantrature::bench {
namespace {

void run(qtr_moments_over over) {
  static std::vector<Moments> out(kSide);
  compute_moments(
      {sizeof(MomentsArgs), weight_matrix(), over, -1, out.data(), over == QTR_OVER_TENSOR ? 1 : kSide});
}

constexpr int64_t kBytes = kSide * kSide * 4;
int tensor = for_every_target("moments/tensor", kBytes, [] { run(QTR_OVER_TENSOR); });
int rows = for_every_target("moments/rows", kBytes, [] { run(QTR_OVER_ROWS); });
int columns = for_every_target("moments/columns", kBytes, [] { run(QTR_OVER_COLUMNS); });

}  // namespace
}  // namespace quantrature::bench
