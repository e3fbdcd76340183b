#include <cstring>

#include "cases.hpp"

namespace quantrature {
namespace {

std::vector<Moments> run(const Matrix& x, qtr_moments_over over, int64_t group_size) {
  MomentsArgs args{sizeof(MomentsArgs), x, over, group_size, nullptr, 0};
  std::vector<Moments> out(static_cast<size_t>(moments_count(args)));
  args.out = out.data();
  args.out_count = static_cast<int64_t>(out.size());
  compute_moments(args);
  return out;
}

bool same_bits(const std::vector<Moments>& a, const std::vector<Moments>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(Moments)) == 0;
}

// The definition, in the widest arithmetic there is.
Moments exact(const std::vector<float>& x) {
  Moments m{};
  long double mean = 0, m2 = 0, m3 = 0, m4 = 0;
  for (float value : x) mean += value;
  mean /= static_cast<long double>(x.size());
  for (float value : x) {
    const long double d = value - mean;
    m2 += d * d, m3 += d * d * d, m4 += d * d * d * d;
  }
  m.count = static_cast<double>(x.size());
  m.mean = static_cast<double>(mean), m.m2 = static_cast<double>(m2);
  m.m3 = static_cast<double>(m3), m.m4 = static_cast<double>(m4);
  return m;
}

TEST(Moments, EveryTargetAgreesWithTheReferenceInEveryBit) {
  for (const std::string& kind : cases::kKinds) {
    for (DType dtype : cases::kDTypes) {
      for (int64_t cols : cases::kLengths) {
        const cases::Sample s = cases::sample(kind, 3, cols, dtype, cols % 3);
        for (qtr_moments_over over : {QTR_OVER_TENSOR, QTR_OVER_ROWS, QTR_OVER_COLUMNS}) {
          SCOPED_TRACE(kind + ", cols " + std::to_string(cols) + ", dtype " + std::to_string(dtype));
          const auto expected = cases::on_reference([&] { return run(s.view(), over, -1); });
          cases::on_every_target([&] { EXPECT_TRUE(same_bits(run(s.view(), over, -1), expected)); });
        }
      }
    }
  }
}

TEST(Moments, ColumnsAndGroupsOfManyRows) {
  for (int64_t rows : {1, 5, 127, 128, 129, 300}) {
    const cases::Sample s = cases::sample("normal", rows, 37, QTR_F32, 5);
    for (int64_t group : {-1, 1, 64, 100, 1000}) {
      const auto expected = cases::on_reference([&] { return run(s.view(), QTR_OVER_COLUMNS, group); });
      cases::on_every_target(
          [&] { EXPECT_TRUE(same_bits(run(s.view(), QTR_OVER_COLUMNS, group), expected)); });
    }
  }
}

TEST(Moments, IsTheDefinition) {
  for (const char* kind : {"normal", "offset", "tails"}) {
    const cases::Sample s = cases::sample(kind, 1, 9001, QTR_F32);
    const Moments expected = exact(s.values);
    const Moments got = run(s.view(), QTR_OVER_TENSOR, -1)[0];
    EXPECT_NEAR(got.mean, expected.mean,
                1e-14 * std::sqrt(expected.m2 / 9001) + 1e-15 * std::abs(expected.mean));
    EXPECT_NEAR(got.m2, expected.m2, 1e-13 * expected.m2);
    EXPECT_NEAR(got.m4, expected.m4, 1e-13 * expected.m4);
  }
}

TEST(Moments, GroupsAreTheMomentsOfTheirParts) {
  const cases::Sample s = cases::sample("normal", 2, 100, QTR_F32);
  const auto groups = run(s.view(), QTR_OVER_ROWS, 32);
  ASSERT_EQ(groups.size(), 8u);
  for (int64_t row = 0; row < 2; ++row) {
    for (int64_t g = 0; g < 4; ++g) {
      const int64_t n = std::min<int64_t>(32, 100 - g * 32);
      const Matrix part{s.values.data() + row * 100 + g * 32, 1, n, n, QTR_F32};
      EXPECT_TRUE(same_bits({groups[static_cast<size_t>(row * 4 + g)]}, run(part, QTR_OVER_TENSOR, -1)));
    }
  }
}

TEST(Moments, MergeIsTheUnion) {
  const cases::Sample s = cases::sample("offset", 1, 4000, QTR_F32);
  const auto part = [&](int64_t begin, int64_t end) {
    return run(Matrix{s.values.data() + begin, 1, end - begin, end - begin, QTR_F32}, QTR_OVER_TENSOR, -1)[0];
  };
  const Moments whole = part(0, 4000), merged = merge_moments(part(0, 1234), part(1234, 4000));
  EXPECT_EQ(merged.count, whole.count);
  EXPECT_NEAR(merged.mean, whole.mean, 1e-12);
  EXPECT_NEAR(merged.m2, whole.m2, 1e-12 * whole.m2);
  EXPECT_NEAR(merged.m3, whole.m3, 1e-11 * whole.m4);
  EXPECT_NEAR(merged.m4, whole.m4, 1e-12 * whole.m4);
  EXPECT_EQ(merge_moments(Moments{}, whole).m4, whole.m4);
}

TEST(Moments, NotANumberReachesTheSums) {
  std::vector<float> x(100, 1.0f);
  x[37] = std::numeric_limits<float>::quiet_NaN();
  cases::on_every_target([&] {
    const Moments m = run(Matrix{x.data(), 1, 100, 100, QTR_F32}, QTR_OVER_TENSOR, -1)[0];
    EXPECT_TRUE(std::isnan(m.mean) && std::isnan(m.m4) && std::isnan(kurtosis(m, true, true)));
    EXPECT_EQ(m.minimum, 1.0);
  });
}

TEST(Kurtosis, OfKnownSets) {
  const std::vector<float> x = {1, 2, 3, 4, 5};
  const Moments m = run(Matrix{x.data(), 1, 5, 5, QTR_F32}, QTR_OVER_TENSOR, -1)[0];
  EXPECT_DOUBLE_EQ(kurtosis(m, false, true), 1.7);
  EXPECT_DOUBLE_EQ(kurtosis(m, true, true), -1.3);
  EXPECT_DOUBLE_EQ(kurtosis(m, true, false), -1.2);
  const std::vector<float> constant(10, 3.0f);
  EXPECT_TRUE(std::isnan(
      kurtosis(run(Matrix{constant.data(), 1, 10, 10, QTR_F32}, QTR_OVER_TENSOR, -1)[0], true, true)));
}

TEST(Moments, RefusesWhatBreaksTheContract) {
  const float x[4] = {};
  Moments out[4];
  const auto refused = [&](MomentsArgs args, const char* message) {
    try {
      compute_moments(args);
      ADD_FAILURE() << "accepted, expected: " << message;
    } catch (const InvalidArgument& e) {
      EXPECT_NE(std::string(e.what()).find(message), std::string::npos) << e.what();
    }
  };
  const MomentsArgs good{sizeof(MomentsArgs), Matrix{x, 2, 2, 2, QTR_F32}, QTR_OVER_ROWS, -1, out, 2};
  compute_moments(good);
  MomentsArgs bad = good;
  bad.x.rows = 0;
  refused(bad, "[moments] x must not be empty: got rows=0, cols=2");
  bad = good, bad.x.data = nullptr;
  refused(bad, "[moments] x must not be null");
  bad = good, bad.x.row_stride = 1;
  refused(bad, "[moments] x has rows that overlap");
  bad = good, bad.x.dtype = static_cast<DType>(9);
  refused(bad, "[moments] x must be float32, float16 or bfloat16: got dtype=9");
  bad = good, bad.group_size = 0;
  refused(bad, "[moments] group_size must be -1 or at least 1: got group_size=0");
  bad = good, bad.out_count = 3;
  refused(bad, "[moments] out must hold one result for each set: got out_count=3, expected=2");
  bad = good, bad.over = static_cast<qtr_moments_over>(7), bad.out_count = 1;
  refused(bad, "[moments] over must be tensor, rows or columns: got over=7");
}

}  // namespace
}  // namespace quantrature
