#include <cmath>
#include <cstring>

#include "cases.hpp"

namespace quantrature {
namespace {

const std::vector<int64_t> kSizes = {1,  2,  3,  4,   7,   8,   12,  16,  20,  24,
                                     48, 64, 96, 172, 256, 288, 640, 768, 4096};

std::vector<float> transformed(const cases::Sample& x, const uint8_t* signs, bool inverse) {
  std::vector<float> out(static_cast<size_t>(x.rows * x.cols), std::numeric_limits<float>::quiet_NaN());
  hadamard({sizeof(HadamardArgs), x.view(), signs, inverse, {out.data(), x.rows, x.cols, x.cols, QTR_F32}});
  return out;
}

std::vector<uint8_t> signs_of(int64_t n, uint64_t seed) {
  std::vector<uint8_t> signs(static_cast<size_t>((n + 7) / 8));
  random_signs({sizeof(RandomSignsArgs), seed, n, signs.data()});
  return signs;
}

// The transform of unit vectors: the matrix itself.
std::vector<float> matrix(int64_t n, bool inverse = false) {
  cases::Sample unit = cases::sample("zero", n, n, QTR_F32);
  for (int64_t i = 0; i < n; ++i) unit.values[static_cast<size_t>(i * n + i)] = 1;
  return transformed(unit, nullptr, inverse);
}

TEST(Hadamard, OfAPowerOfTwoHasTheSignsOfSylvester) {
  for (int64_t n : {1, 2, 4, 8, 16, 32, 64, 128}) {
    EXPECT_EQ(hadamard_order(n), 1);
    const std::vector<float> a = matrix(n);
    const auto norm = static_cast<float>(1 / std::sqrt(static_cast<double>(n)));
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j)
        EXPECT_EQ(a[static_cast<size_t>(i * n + j)], __builtin_popcountll(i & j) % 2 ? -norm : norm);
  }
}

TEST(Hadamard, TakesPaleysMatricesWhereThereAreSome) {
  for (auto [n, order] : std::vector<std::pair<int64_t, int64_t>>{{12, 12},
                                                                  {768, 12},
                                                                  {2560, 20},
                                                                  {3584, 28},
                                                                  {960, 60},
                                                                  {5632, 44},
                                                                  {4864, 76},
                                                                  {18944, 148},
                                                                  {24, 12},
                                                                  {11008, 43},
                                                                  {6, 3},
                                                                  {40, 20}}) {
    EXPECT_EQ(hadamard_order(n), order) << n;
    if (n > 1000 || order % 4 != 0) continue;
    const auto norm = static_cast<float>(1 / std::sqrt(static_cast<double>(n)));
    for (float element : matrix(n)) EXPECT_EQ(std::abs(element), norm) << n;
  }
}

TEST(Hadamard, IsOrthogonalAndItsInverseTheTransposed) {
  for (int64_t n : {3, 12, 20, 24, 28, 43, 60, 72, 76, 96, 172}) {
    const std::vector<float> a = matrix(n), b = matrix(n, true);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) {
        double sum = 0;
        for (int64_t k = 0; k < n; ++k)
          sum += static_cast<double>(a[static_cast<size_t>(i * n + k)]) *
                 static_cast<double>(a[static_cast<size_t>(j * n + k)]);
        ASSERT_NEAR(sum, i == j, 1e-6) << n;
        ASSERT_NEAR(a[static_cast<size_t>(i * n + j)], b[static_cast<size_t>(j * n + i)], 1e-6) << n;
      }
  }
}

TEST(Hadamard, IsTheSameOnEveryTarget) {
  for (int64_t n : kSizes)
    for (DType dtype : cases::kDTypes)
      for (bool inverse : {false, true}) {
        const cases::Sample x = cases::sample("normal", 5, n, dtype, 3);
        const std::vector<uint8_t> signs = signs_of(n, 7);
        const auto expected = cases::on_reference([&] { return transformed(x, signs.data(), inverse); });
        cases::on_every_target([&] {
          const auto got = transformed(x, signs.data(), inverse);
          ASSERT_EQ(std::memcmp(got.data(), expected.data(), got.size() * sizeof(float)), 0) << n;
        });
      }
}

TEST(Hadamard, TheInverseTakesItBackInPlace) {
  for (int64_t n : kSizes) {
    const cases::Sample x = cases::sample("normal", 3, n, QTR_F32);
    const std::vector<uint8_t> signs = signs_of(n, 1);
    std::vector<float> y = x.values;
    HadamardArgs args{
        sizeof(HadamardArgs), {y.data(), 3, n, n, QTR_F32}, signs.data(), 0, {y.data(), 3, n, n, QTR_F32}};
    hadamard(args);
    args.inverse = 1;
    hadamard(args);
    for (size_t i = 0; i < y.size(); ++i) ASSERT_NEAR(y[i], x.values[i], 1e-5) << n;
  }
}

TEST(RandomSigns, AreTheWordsOfSplitmix64) {
  // The first words of the published generator from the state 1234567.
  const uint64_t words[] = {6457827717110365317u, 3203168211198807973u};
  const std::vector<uint8_t> signs = signs_of(100, 1234567);
  for (int64_t i = 0; i < 104; ++i)
    EXPECT_EQ(signs[static_cast<size_t>(i / 8)] >> i % 8 & 1, i < 100 ? words[i / 64] >> i % 64 & 1 : 0) << i;
}

TEST(Hadamard, RefusesWhatBreaksTheContract) {
  const cases::Sample x = cases::sample("normal", 2, 8, QTR_F32);
  std::vector<float> y(16);
  const HadamardArgs good{sizeof(HadamardArgs), x.view(), nullptr, 0, {y.data(), 2, 8, 8, QTR_F32}};
  hadamard(good);
  const auto refuses = [&](auto&& change, const char* message) {
    HadamardArgs bad = good;
    change(bad);
    try {
      hadamard(bad);
      ADD_FAILURE() << "accepted, expected: " << message;
    } catch (const InvalidArgument& e) {
      EXPECT_NE(std::string(e.what()).find(message), std::string::npos) << e.what();
    }
  };
  refuses([](HadamardArgs& a) { a.x.rows = 0; }, "[hadamard] x must not be empty");
  refuses([](HadamardArgs& a) { a.out.cols = 4; },
          "[hadamard] out must have the shape of x: got rows=2, cols=4");
  refuses([](HadamardArgs& a) { a.out.data = nullptr; }, "[hadamard] out must not be null");
  refuses([](HadamardArgs& a) { a.x.cols = a.x.row_stride = a.out.cols = a.out.row_stride = 2053; },
          "[hadamard] columns must not have so large an odd factor: got cols=2053, order=2053");
  EXPECT_THROW(hadamard_order(0), InvalidArgument);
  uint8_t byte = 0;
  EXPECT_THROW(random_signs({sizeof(RandomSignsArgs), 0, 0, &byte}), InvalidArgument);
  EXPECT_THROW(random_signs({sizeof(RandomSignsArgs), 0, 8, nullptr}), InvalidArgument);
}

}  // namespace
}  // namespace quantrature
