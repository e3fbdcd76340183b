#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "quantrature/quantrature.hpp"

namespace quantrature {
namespace {

struct Problem {
  std::vector<double> costs;
  std::vector<int64_t> sizes;
  std::vector<int64_t> offsets{0};
  int64_t budget = 0;

  int64_t items() const { return static_cast<int64_t>(offsets.size()) - 1; }
  void add(const std::vector<double>& c, const std::vector<int64_t>& s) {
    costs.insert(costs.end(), c.begin(), c.end());
    sizes.insert(sizes.end(), s.begin(), s.end());
    offsets.push_back(static_cast<int64_t>(costs.size()));
  }
  int64_t smallest() const { return extreme(false); }
  int64_t largest() const { return extreme(true); }
  int64_t extreme(bool largest) const {
    int64_t sum = 0;
    for (int64_t i = 0; i < items(); ++i) {
      const auto begin = sizes.begin() + offsets[static_cast<size_t>(i)],
                 end = sizes.begin() + offsets[static_cast<size_t>(i) + 1];
      sum += largest ? *std::max_element(begin, end) : *std::min_element(begin, end);
    }
    return sum;
  }
};

struct Choice {
  std::vector<int64_t> chosen;
  double cost = 0, bound = 0;
  int64_t size = 0;
};

Choice solve(const Problem& p, double relative_gap = 0, int64_t max_states = 0) {
  Choice c;
  c.chosen.resize(static_cast<size_t>(p.items()), -1);
  AllocateArgs a{
      sizeof(AllocateArgs), p.costs.data(), p.sizes.data(),  p.offsets.data(), p.items(), p.budget,
      relative_gap,         max_states,     c.chosen.data(), &c.cost,          &c.size,   &c.bound};
  allocate(a);
  double cost = 0;
  int64_t size = 0;
  for (int64_t i = 0; i < p.items(); ++i) {
    const int64_t at = p.offsets[static_cast<size_t>(i)] + c.chosen[static_cast<size_t>(i)];
    EXPECT_GE(c.chosen[static_cast<size_t>(i)], 0);
    EXPECT_LT(at, p.offsets[static_cast<size_t>(i) + 1]);
    cost += p.costs[static_cast<size_t>(at)];
    size += p.sizes[static_cast<size_t>(at)];
  }
  EXPECT_EQ(c.cost, cost);
  EXPECT_EQ(c.size, size);
  EXPECT_LE(c.size, p.budget);
  EXPECT_LE(c.bound, c.cost);
  return c;
}

// The definition: the least cost for every size, item after item.
double least_cost(const Problem& p) {
  constexpr double kNone = std::numeric_limits<double>::infinity();
  std::vector<double> least(static_cast<size_t>(p.budget) + 1, kNone);
  least[0] = 0;
  for (int64_t i = 0; i < p.items(); ++i) {
    std::vector<double> next(least.size(), kNone);
    for (int64_t j = p.offsets[static_cast<size_t>(i)]; j < p.offsets[static_cast<size_t>(i) + 1]; ++j) {
      const auto size = static_cast<size_t>(p.sizes[static_cast<size_t>(j)]);
      for (size_t s = size; s < least.size(); ++s)
        next[s] = std::min(next[s], least[s - size] + p.costs[static_cast<size_t>(j)]);
    }
    least = next;
  }
  return *std::min_element(least.begin(), least.end());
}

Problem random_problem(std::mt19937& random, int items, int options, int largest_size,
                       const std::string& kind) {
  Problem p;
  std::exponential_distribution<double> exponential;
  std::normal_distribution<double> normal;
  std::uniform_int_distribution<int> sizes(0, largest_size), counts(1, options);
  for (int i = 0; i < items; ++i) {
    std::vector<double> c;
    std::vector<int64_t> s;
    const double weight = std::exp(normal(random));
    for (int j = counts(random); j > 0; --j) {
      s.push_back(sizes(random));
      const auto size = static_cast<double>(s.back());
      if (kind == "loss")
        c.push_back(weight * std::exp2(-6 * size / largest_size) * (1 + 0.1 * normal(random)));
      if (kind == "any") c.push_back(normal(random));
      if (kind == "correlated") c.push_back(100 - size + 0.01 * normal(random));
      if (kind == "whole") c.push_back(std::floor(4 * exponential(random)));
    }
    p.add(c, s);
  }
  const double place = std::uniform_real_distribution<double>(0, 1.1)(random);
  p.budget = p.smallest() + static_cast<int64_t>(place * static_cast<double>(p.largest() - p.smallest()));
  return p;
}

class EveryKind : public testing::TestWithParam<std::string> {};

TEST_P(EveryKind, TheChoiceIsTheBestThereIs) {
  std::mt19937 random(7);
  for (int i = 0; i < 600; ++i) {
    const Problem p = random_problem(random, 1 + i % 12, 1 + i % 7, i % 3 ? 20 : 300, GetParam());
    const Choice c = solve(p);
    EXPECT_NEAR(c.cost, least_cost(p), 1e-11 * (1 + std::abs(c.cost))) << "problem " << i;
    EXPECT_NEAR(c.bound, c.cost, 1e-11 * (1 + std::abs(c.cost))) << "problem " << i;
  }
}

TEST_P(EveryKind, LargeProblemsAreSolvedToo) {
  std::mt19937 random(8);
  for (int i = 0; i < 4; ++i) {
    const Problem p = random_problem(random, 100, 12, 40, GetParam());
    const Choice c = solve(p);
    EXPECT_NEAR(c.cost, least_cost(p), 1e-10 * (1 + std::abs(c.cost)));
  }
}

// With few states kept, or an early stop, the bound still holds.
TEST_P(EveryKind, BoundsHoldWhereTheSearchIsCutShort) {
  std::mt19937 random(9);
  bool short_of_the_best = false;
  for (int i = 0; i < 300; ++i) {
    const Problem p = random_problem(random, 12, 6, 300, GetParam());
    const double least = least_cost(p);
    for (const auto& [gap, states] : {std::pair<double, int64_t>{0, 1}, {0, 3}, {0.02, 0}}) {
      const Choice c = solve(p, gap, states);
      EXPECT_LE(c.bound, least + 1e-9);
      EXPECT_GE(c.cost, least - 1e-9);
      if (gap > 0) {
        EXPECT_LE(c.cost - least, gap * std::abs(c.cost) + 1e-9);
      }
      short_of_the_best |= c.cost > least + 1e-9;
    }
  }
  if (GetParam() != "correlated") {
    EXPECT_TRUE(short_of_the_best) << "the limits were never felt";
  }
}

INSTANTIATE_TEST_SUITE_P(Allocation, EveryKind, testing::Values("loss", "any", "correlated", "whole"),
                         [](const auto& kind) { return kind.param; });

TEST(Allocation, TiesGoToTheFirstOption) {
  Problem p;
  p.add({1, 1, 1}, {2, 2, 2});
  p.budget = 2;
  EXPECT_EQ(solve(p).chosen, std::vector<int64_t>{0});
}

TEST(Allocation, SizesBeyondThirtyTwoBitsAreExact) {
  Problem p;
  const int64_t big = int64_t{1} << 55;
  for (int i = 0; i < 3; ++i) p.add({3, 2, 0}, {big, big + 1, big + 2});
  p.budget = 3 * big + 4;
  const Choice c = solve(p);
  EXPECT_EQ(c.cost, 3);
  EXPECT_EQ(c.size, p.budget);
  p.budget -= 1;
  EXPECT_EQ(solve(p).cost, 5);
}

TEST(Allocation, Refusals) {
  Problem p;
  p.add({1, 0}, {1, 2});
  p.add({1, 0}, {1, 2});
  p.budget = 3;
  int64_t chosen[2];
  const AllocateArgs good{sizeof(AllocateArgs),
                          p.costs.data(),
                          p.sizes.data(),
                          p.offsets.data(),
                          2,
                          3,
                          0,
                          0,
                          chosen,
                          nullptr,
                          nullptr,
                          nullptr};
  EXPECT_NO_THROW(allocate(good));
  const auto refused = [&](auto&& spoil, const std::string& what) {
    AllocateArgs a = good;
    spoil(a);
    try {
      allocate(a);
      ADD_FAILURE() << "accepted: " << what;
    } catch (const InvalidArgument& e) {
      EXPECT_NE(std::string(e.what()).find("[allocate] " + what), std::string::npos) << e.what();
    }
  };
  refused([](AllocateArgs& a) { a.items = 0; }, "items must be at least 1: got items=0");
  refused([](AllocateArgs& a) { a.costs = nullptr; }, "costs must not be null");
  refused([](AllocateArgs& a) { a.sizes = nullptr; }, "sizes must not be null");
  refused([](AllocateArgs& a) { a.option_offsets = nullptr; }, "option_offsets must not be null");
  refused([](AllocateArgs& a) { a.chosen = nullptr; }, "chosen must not be null");
  refused([](AllocateArgs& a) { a.relative_gap = -1; }, "relative_gap must be finite and at least 0");
  refused([](AllocateArgs& a) { a.relative_gap = NAN; }, "relative_gap must be finite and at least 0");
  refused([](AllocateArgs& a) { a.max_states = -1; }, "max_states must be 0 to 2^24");
  refused([](AllocateArgs& a) { a.max_states = (1 << 24) + 1; }, "max_states must be 0 to 2^24");
  refused([](AllocateArgs& a) { a.budget = 1; },
          "the smallest choice must be within the budget: got smallest=2");
  int64_t offsets[3] = {1, 2, 4};
  refused([&](AllocateArgs& a) { a.option_offsets = offsets; }, "option_offsets must begin with 0");
  offsets[0] = 0;
  offsets[1] = 0;
  refused([&](AllocateArgs& a) { a.option_offsets = offsets; }, "option_offsets must rise");
  double costs[4] = {1, 0, NAN, 0};
  refused([&](AllocateArgs& a) { a.costs = costs; }, "costs must be finite: got item=1, option=0");
  std::fill_n(costs, 4, 1e308);
  refused([&](AllocateArgs& a) { a.costs = costs; }, "costs must add up to a finite number");
  int64_t sizes[4] = {1, 2, 1, -1};
  refused([&](AllocateArgs& a) { a.sizes = sizes; },
          "sizes must be at least 0: got item=1, option=1, size=-1");
  sizes[3] = INT64_MAX;
  refused([&](AllocateArgs& a) { a.sizes = sizes; }, "sizes must add up to at most 2^62: got item=1");
}

}  // namespace
}  // namespace quantrature
