#include "bench.hpp"

namespace quantrature::bench {
namespace {

constexpr int64_t kNumbers = kSide * kSide;

void run(int64_t count, bool per_row) {
  static std::vector<float> remainder(static_cast<size_t>(kNumbers)),
      values(static_cast<size_t>(kNumbers / 100));
  static std::vector<uint16_t> columns(values.size());
  static std::vector<int32_t> row_offsets(kSide + 1);
  extract_outliers({sizeof(OutliersArgs), weight_matrix(), count, per_row, nullptr,
                    MutableMatrix{remainder.data(), kSide, kSide, kSide, QTR_F32}, values.data(),
                    columns.data(), row_offsets.data()});
}

int tensor = for_every_target("extract_outliers/tensor", kNumbers * 8, [] { run(kNumbers / 200, false); });
int rows = for_every_target("extract_outliers/rows", kNumbers * 8, [] { run(kSide / 200, true); });

}  // namespace
}  // namespace quantrature::bench
