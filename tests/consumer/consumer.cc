// Moments and an exception, through the C++ interface.
#include <cmath>
#include <cstdio>
#include <vector>

#include "quantrature/quantrature.hpp"

int main() {
  std::vector<float> x(1000);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 2);
  quantrature::Moments m{};
  quantrature::MomentsArgs args{};
  args.struct_size = sizeof args;
  args.x = {x.data(), 1, static_cast<int64_t>(x.size()), static_cast<int64_t>(x.size()), QTR_F32};
  args.over = QTR_OVER_TENSOR;
  args.group_size = -1;
  args.out = &m;
  args.out_count = 1;
  quantrature::compute_moments(args);
  if (m.mean != 0.5 || std::abs(quantrature::kurtosis(m, false, true) - 1) > 1e-12) return 1;
  args.out_count = 2;
  try {
    quantrature::compute_moments(args);
  } catch (const quantrature::InvalidArgument& e) {
    std::printf("%s\n", e.what());
    return 0;
  }
  return 1;
}
