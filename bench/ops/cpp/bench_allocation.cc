// The budget of a large model: 80 layers of 7 matrices, each in 2, 3 or 4 bits with groups of 32, 64 or 128,
// at 3.25 bits a weight. Costs fall by a factor of about four for a bit, and matrices differ by a few orders
// of magnitude.
#include <cmath>

#include "bench.hpp"

namespace quantrature::bench {
namespace {

struct Table {
  std::vector<double> costs;
  std::vector<int64_t> sizes, offsets{0};
  int64_t weights = 0;
};

const Table& table() {
  static const Table made = [] {
    Table t;
    std::mt19937 generator(0);
    std::normal_distribution<double> normal;
    constexpr int64_t kShapes[7][2] = {{8192, 8192},  {1024, 8192},  {1024, 8192}, {8192, 8192},
                                       {28672, 8192}, {28672, 8192}, {8192, 28672}};
    for (int layer = 0; layer < 80; ++layer)
      for (const auto& shape : kShapes) {
        const int64_t count = shape[0] * shape[1];
        const double sensitivity = std::exp(1.5 * normal(generator));
        for (int bits : {2, 3, 4})
          for (int group : {32, 64, 128}) {
            const double noise = std::exp(0.1 * normal(generator));
            t.costs.push_back(sensitivity * noise * std::pow(4.0, -bits) * std::pow(group, 0.25));
            t.sizes.push_back(count * bits / 8 + count / group * 4);
          }
        t.offsets.push_back(static_cast<int64_t>(t.costs.size()));
        t.weights += count;
      }
    return t;
  }();
  return made;
}

void allocation(benchmark::State& state, double relative_gap) {
  const Table& t = table();
  std::vector<int64_t> chosen(t.offsets.size() - 1);
  double cost = 0, bound = 0;
  int64_t size = 0;
  const AllocateArgs args{sizeof(AllocateArgs),
                          t.costs.data(),
                          t.sizes.data(),
                          t.offsets.data(),
                          static_cast<int64_t>(chosen.size()),
                          t.weights * 13 / 32,
                          relative_gap,
                          0,
                          chosen.data(),
                          &cost,
                          &size,
                          &bound};
  for (auto _ : state) allocate(args);
  state.counters["cost"] = cost;
  state.counters["gap"] = (cost - bound) / cost;
}

BENCHMARK_CAPTURE(allocation, 560_matrices_9_options_optimum, 0)
    ->Unit(benchmark::kMillisecond)
    ->UseRealTime();
BENCHMARK_CAPTURE(allocation, 560_matrices_9_options_gap_1e_4, 1e-4)
    ->Unit(benchmark::kMillisecond)
    ->UseRealTime();

}  // namespace
}  // namespace quantrature::bench
