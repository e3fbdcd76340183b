#include <cmath>

#include "cases.hpp"
#include "ops/kmeans/sums.hpp"
#include "runtime/dispatch.hpp"

namespace quantrature {
namespace {

struct Clusters {
  std::vector<float> centroids;
  std::vector<uint8_t> assignment;

  bool operator==(const Clusters&) const = default;
};

Clusters run(const cases::Sample& x, const cases::Sample* weights, int k) {
  Clusters c{std::vector<float>(static_cast<size_t>(x.rows * k)),
             std::vector<uint8_t>(static_cast<size_t>(x.rows * x.cols))};
  kmeans({sizeof(KmeansArgs), x.view(), weights ? weights->view() : Matrix{}, k,
          MutableMatrix{c.centroids.data(), x.rows, k, k, QTR_F32}, c.assignment.data()});
  return c;
}

cases::Sample weights_for(const cases::Sample& x) {
  cases::Sample w = cases::sample("normal", x.rows, x.cols, QTR_F32, 0, 1);
  for (float& value : w.values) value *= value;
  return w;
}

// The least cost, without splits that move only right.
long double least_cost(const cases::Sample& x, int64_t row, const cases::Sample& weights, int k) {
  std::vector<std::pair<float, float>> numbers;
  for (int64_t j = 0; j < x.cols; ++j) numbers.push_back({x.at(row, j), weights.at(row, j)});
  std::sort(numbers.begin(), numbers.end());
  const size_t n = numbers.size();
  std::vector<long double> best(n + 1, 1e300L);
  best[0] = 0;
  for (int c = 0; c < k; ++c) {
    std::vector<long double> next(best);
    for (size_t begin = 0; begin < n; ++begin) {
      long double mass = 0, mean = 0, cost = 0;
      for (size_t end = begin; end < n; ++end) {
        const long double w = numbers[end].second, apart = numbers[end].first - mean;
        mass += w;
        if (mass > 0) mean += w / mass * apart;
        cost += w * apart * (numbers[end].first - mean);
        next[end + 1] = std::min(next[end + 1], best[begin] + cost);
      }
    }
    best = next;
  }
  return best[n];
}

TEST(Kmeans, FindsTheLeastCost) {
  for (const std::string& kind : cases::kKinds)
    for (int64_t cols : {1, 2, 9, 60, 100, 333})
      for (int k : {1, 2, 5, 16}) {
        SCOPED_TRACE(kind + ", cols " + std::to_string(cols) + ", k " + std::to_string(k));
        const cases::Sample x = cases::sample(kind, 3, cols, QTR_F32);
        const cases::Sample weights = weights_for(x);
        const Clusters c = run(x, &weights, k);
        for (int64_t row = 0; row < 3; ++row) {
          long double cost = 0, size = 0, mass = 0;
          for (int64_t j = 0; j < cols; ++j) {
            const float* centroids = c.centroids.data() + row * k;
            const int chosen = c.assignment[static_cast<size_t>(row * cols + j)];
            const long double apart = static_cast<long double>(x.at(row, j)) - centroids[chosen];
            for (int other = 0; other < k; ++other)
              ASSERT_LE(std::abs(apart), std::abs(static_cast<long double>(x.at(row, j)) - centroids[other]));
            cost += weights.at(row, j) * apart * apart;
            mass += weights.at(row, j);
            size += weights.at(row, j) * static_cast<long double>(x.at(row, j)) * x.at(row, j);
          }
          // Centroids are rounded to float32, which is coarse for tiny numbers.
          const long double rounding = size * 0x1p-47L + mass * 0x1p-299L;
          EXPECT_LE(cost, least_cost(x, row, weights, k) * (1 + 1e-9L) + rounding);
        }
      }
}

TEST(Kmeans, IsTheSameEverywhere) {
  for (const std::string& kind : cases::kKinds)
    for (int k : {2, 16, 100}) {
      SCOPED_TRACE(kind + ", k " + std::to_string(k));
      const cases::Sample x = cases::sample(kind, 9, 700, QTR_F32, 5);
      const cases::Sample weights = weights_for(x);
      const Clusters expected = cases::on_reference([&] { return run(x, &weights, k); });
      cases::on_every_target([&] { EXPECT_TRUE(run(x, &weights, k) == expected); });
    }
}

// Of every number of begins, at every place, with equal costs and with sums that lost a weight.
TEST(Kmeans, KernelsFindTheLowestOfTheBest) {
  constexpr int64_t kNumbers = 70;
  std::vector<double> sums[4];
  for (auto& s : sums) s.resize(kNumbers + 1 + kKmeansEnds);
  std::mt19937 generator(1);
  for (int64_t i = 1; i <= kNumbers; ++i) {
    const size_t to = static_cast<size_t>(i);
    const double x = static_cast<double>(i / 2), weight = i % 9 == 0 ? 0.0 : 1.0;
    sums[0][to] = sums[0][to - 1] + weight;
    sums[1][to] = sums[1][to - 1] + x;
    sums[2][to] = sums[2][to - 1] + x * x;
    sums[3][to] = static_cast<double>(generator() % 4);
  }
  const KmeansSums s{sums[0].data(), sums[1].data(), sums[2].data(), sums[3].data()};
  const auto found = [&] {
    std::vector<double> all;
    for (int64_t first = 0; first < 20; ++first)
      for (int64_t last = first; last < 45; ++last) {
        double least;
        all.push_back(static_cast<double>(kernels().kmeans_begin(s, first, last, last + 3, &least)));
        all.push_back(least);
        double costs[kKmeansEnds];
        int32_t begins[kKmeansEnds];
        kernels().kmeans_begins(s, first, last, last + 1, 0.5, costs, begins);
        all.insert(all.end(), costs, costs + kKmeansEnds);
        all.insert(all.end(), begins, begins + kKmeansEnds);
      }
    return all;
  };
  const std::vector<double> expected = cases::on_reference(found);
  cases::on_every_target([&] { EXPECT_EQ(found(), expected); });
}

TEST(Kmeans, LightNumbersAreNotLostBesideHeavyOnes) {
  cases::Sample x = cases::sample("normal", 1, 5, QTR_F32);
  x.values = {-3, -2, 0, 1, 5};
  cases::Sample weights = x;
  weights.values = {1e-30f, 1e30f, 1e-30f, 1e30f, 1e-30f};
  EXPECT_EQ(run(x, &weights, 5).centroids, (std::vector<float>{-3, -2, 0, 1, 5}));
  const Clusters c = run(x, &weights, 2);
  EXPECT_EQ(c.centroids, (std::vector<float>{-2, 1}));
}

TEST(Kmeans, DivisionsAreTheLowestOfTheBest) {
  cases::Sample x = cases::sample("normal", 1, 3, QTR_F32);
  x.values = {3, 1, 2};
  const Clusters c = run(x, nullptr, 2);
  EXPECT_EQ(c.centroids, (std::vector<float>{1, 2.5f}));
  EXPECT_EQ(c.assignment, (std::vector<uint8_t>{1, 0, 1}));
}

TEST(Kmeans, FewNumbersLeaveCentroidsOver) {
  cases::Sample x = cases::sample("normal", 1, 5, QTR_F32);
  x.values = {2, 1, 2, 1, 7};
  cases::Sample weights = x;
  weights.values = {1, 1, 1, 1, 0};
  const Clusters c = run(x, &weights, 4);
  EXPECT_EQ(c.centroids, (std::vector<float>{1, 2, 2, 2}));
  EXPECT_EQ(c.assignment, (std::vector<uint8_t>{1, 0, 1, 0, 1}));
  weights.values = {0, 0, 0, 0, 0};
  EXPECT_TRUE(run(x, &weights, 4) == run(x, nullptr, 4));
}

TEST(Kmeans, RefusesWhatBreaksTheContract) {
  const cases::Sample x = cases::sample("normal", 2, 30, QTR_F32);
  std::vector<float> centroids(8);
  std::vector<uint8_t> assignment(60);
  const KmeansArgs good{
      sizeof(KmeansArgs), x.view(), {}, 4, MutableMatrix{centroids.data(), 2, 4, 4, QTR_F32},
      assignment.data()};
  kmeans(good);
  const auto refuses = [&](auto&& change, const char* message) {
    KmeansArgs bad = good;
    change(bad);
    try {
      kmeans(bad);
      ADD_FAILURE() << "accepted, expected: " << message;
    } catch (const InvalidArgument& e) {
      EXPECT_NE(std::string(e.what()).find(message), std::string::npos) << e.what();
    }
  };
  refuses([](KmeansArgs& a) { a.x.rows = 0; }, "[kmeans] x must not be empty");
  refuses([](KmeansArgs& a) { a.x.cols = a.x.row_stride = INT32_MAX; },
          "x must have fewer than 2^31 columns");
  refuses([](KmeansArgs& a) { a.k = 0; }, "[kmeans] k must be 1 to 256: got k=0");
  refuses([](KmeansArgs& a) { a.k = 257; }, "[kmeans] k must be 1 to 256: got k=257");
  refuses([](KmeansArgs& a) { a.centroids.cols = 3; },
          "[kmeans] centroids must be float32 of k for each row");
  refuses([](KmeansArgs& a) { a.assignment = nullptr; }, "[kmeans] assignment must not be null");
  cases::Sample weights = x;
  refuses([&](KmeansArgs& a) { a.weights = weights.view(), a.weights.cols = 29; },
          "[kmeans] weights must have the shape of x");
  for (float& w : weights.values) w = 1;
  weights.values[40] = -1;
  refuses([&](KmeansArgs& a) { a.weights = weights.view(); },
          "[kmeans] weights must be finite and not negative: got weight=-1, row=1, column=10");
  cases::Sample infinite = x;
  infinite.values[40] = std::numeric_limits<float>::infinity();
  refuses([&](KmeansArgs& a) { a.x = infinite.view(); },
          "[kmeans] x must be finite: got value=inf, row=1, column=10");
}

}  // namespace
}  // namespace quantrature
