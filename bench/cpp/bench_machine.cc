// The machine's own time for the matrix, which every other figure is compared with; and the entry point.
#include <cstring>

#include "bench.hpp"

namespace quantrature::bench {
namespace {

int registered = [] {
  static std::vector<float> copy(weights().size());
  benchmark::RegisterBenchmark(
      "machine/copy_one_thread",
      [](benchmark::State& state) {
        for (auto _ : state) {
          std::memcpy(copy.data(), weights().data(), copy.size() * sizeof(float));
          benchmark::ClobberMemory();
        }
        state.SetBytesProcessed(state.iterations() * static_cast<int64_t>(copy.size() * 2 * sizeof(float)));
      })
      ->UseRealTime()
      ->Unit(benchmark::kMillisecond);
  return 0;
}();

}  // namespace
}  // namespace quantrature::bench

BENCHMARK_MAIN();
