// The machine's own time for the matrix, which every other figure is compared with; and the entry point.
#include <cstring>
#include <thread>

#include "bench.hpp"

namespace quantrature::bench {
namespace {

// Calls body(begin, end) for a share of the matrix on each of num_threads() threads.
template <class Body>
void on_all_threads(const Body& body) {
  const int64_t size = kSide * kSide, threads = num_threads();
  std::vector<std::thread> others;
  for (int64_t t = 1; t < threads; ++t)
    others.emplace_back(body, size * t / threads, size * (t + 1) / threads);
  body(0, size / threads);
  for (std::thread& other : others) other.join();
}

void read(int64_t begin, int64_t end) {
  const float* w = weights().data();
  uint64_t sums[32] = {};
  for (int64_t i = begin; i < end; i += 64) {
    uint64_t words[32];
    std::memcpy(words, w + i, sizeof(words));
    for (int k = 0; k < 32; ++k) sums[k] ^= words[k];
  }
  benchmark::DoNotOptimize(sums);
}

void copy(int64_t begin, int64_t end) {
  static std::vector<float> copied(weights().size());
  std::memcpy(copied.data() + begin, weights().data() + begin,
              static_cast<size_t>(end - begin) * sizeof(float));
  benchmark::ClobberMemory();
}

int add(const char* name, int64_t bytes, void (*body)(int64_t, int64_t)) {
  benchmark::RegisterBenchmark(name,
                               [=](benchmark::State& state) {
                                 body(0, kSide);  // makes the matrix
                                 for (auto _ : state) on_all_threads(body);
                                 state.SetBytesProcessed(state.iterations() * bytes);
                               })
      ->UseRealTime()
      ->Unit(benchmark::kMillisecond);
  return 0;
}

int read_added = add("machine/read", kSide* kSide * 4, read);
int copy_added = add("machine/copy", kSide* kSide * 8, copy);

}  // namespace
}  // namespace quantrature::bench

BENCHMARK_MAIN();
