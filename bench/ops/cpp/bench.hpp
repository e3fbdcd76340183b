// What the benchmarks share: the matrix they run on, and a benchmark registered once for every kernel set.
#pragma once

#include <benchmark/benchmark.h>

#include <functional>
#include <random>
#include <string>
#include <vector>

#include "quantrature/quantrature.hpp"

namespace quantrature::bench {

inline constexpr int64_t kSide = 4096;

// kSide x kSide weights of a heavy-tailed layer: standard deviation 0.02, one in a thousand eight times as
// large.
inline const std::vector<float>& weights() {
  static const std::vector<float> values = [] {
    std::vector<float> w(kSide * kSide);
    std::mt19937 generator(0);
    std::normal_distribution<float> normal(0, 0.02f);
    for (size_t i = 0; i < w.size(); ++i) w[i] = normal(generator) * (i % 1000 == 7 ? 8.0f : 1.0f);
    return w;
  }();
  return values;
}

inline Matrix weight_matrix() {
  return Matrix{weights().data(), kSide, kSide, kSide, QTR_F32};
}

// Registers body as "name/target"; bytes is what the op must move at the least, and gives the printed bytes
// per second.
inline int for_every_target(const std::string& name, int64_t bytes, const std::function<void()>& body) {
  for (const std::string& kernel_set : available_targets()) {
    benchmark::RegisterBenchmark((name + "/" + kernel_set).c_str(),
                                 [=](benchmark::State& state) {
                                   set_target(kernel_set);
                                   for (auto _ : state) body();
                                   state.SetBytesProcessed(state.iterations() * bytes);
                                 })
        ->UseRealTime()
        ->Unit(benchmark::kMillisecond);
  }
  return 0;
}

}  // namespace quantrature::bench
