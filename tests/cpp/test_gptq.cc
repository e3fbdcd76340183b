#include <cstring>

#include "cases.hpp"
#include "common/cholesky.hpp"

namespace quantrature {
namespace {

// Targets whose multiplication and addition fuse, as those of the reference do.
bool fuses(const std::string& target) {
  return target != "SCALAR" && target != "SSE2" && target != "SSSE3" && target != "SSE4";
}

std::vector<float> hessian_of(const cases::Sample& x) {
  std::vector<float> sum(static_cast<size_t>(x.cols * x.cols));
  hessian_accumulate(
      {sizeof(HessianAccumulateArgs), {sum.data(), x.cols, x.cols, x.cols, QTR_F32}, x.view()});
  return sum;
}

TEST(Hessian, IsTheSameOnEveryTargetAndThreadCountAndNearTheExactSum) {
  for (DType dtype : cases::kDTypes)
    for (int64_t cols : {1, 7, 31, 32, 33, 100})
      for (int64_t rows : {1, 255, 256, 700}) {
        const cases::Sample x = cases::sample("normal", rows, cols, dtype, cols % 3);
        const std::vector<float> expected = cases::on_reference([&] { return hessian_of(x); });
        cases::on_every_target([&] {
          const std::vector<float> got = hessian_of(x);
          if (fuses(target())) {
            EXPECT_EQ(std::memcmp(got.data(), expected.data(), 4 * got.size()), 0);
          }
          for (int64_t i = 0; i < cols; ++i)
            for (int64_t j = 0; j < cols; ++j) {
              long double exact = 0, total = 0;
              for (int64_t t = 0; t < rows; ++t) {
                const long double product = static_cast<long double>(x.at(t, i)) * x.at(t, j);
                exact += product, total += std::abs(product);
              }
              ASSERT_LE(std::abs(got[static_cast<size_t>(i * cols + j)] - exact), 260 * 0x1p-24L * total);
            }
        });
      }
}

TEST(Cholesky, FactorsWhatItIsGivenOnEveryTarget) {
  for (int64_t n : {kCholeskyBlock, 3 * kCholeskyBlock}) {
    const cases::Sample x = cases::sample("normal", n + 20, n, QTR_F32);
    std::vector<double> matrix(static_cast<size_t>(n * n));
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j)
        for (int64_t t = 0; t < x.rows; ++t)
          matrix[static_cast<size_t>(i * n + j)] +=
              static_cast<double>(x.at(t, i)) * static_cast<double>(x.at(t, j));
    cases::on_every_target([&] {
      std::vector<double> l = matrix;
      ASSERT_TRUE(cholesky(l.data(), n));
      for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j <= i; ++j) {
          double sum = 0;
          for (int64_t k = 0; k <= j; ++k)
            sum += l[static_cast<size_t>(i * n + k)] * l[static_cast<size_t>(j * n + k)];
          ASSERT_NEAR(sum, matrix[static_cast<size_t>(i * n + j)], 1e-10 * static_cast<double>(x.rows));
        }
      l = matrix;
      l[static_cast<size_t>((n - 1) * n + n - 1)] = -1;
      EXPECT_FALSE(cholesky(l.data(), n));
    });
  }
}

struct Codes {
  std::vector<uint8_t> bytes;
  GptqResult result;
  std::vector<float> scale, zero;  // that were fitted
};

// A grid of steps of 1/4 around 0, two scales a row.
Codes run(const cases::Sample& w, const std::vector<float>& hessian, int bits, int ordered, bool exclude,
          bool fitted = false) {
  const int64_t group = (w.cols + 1) / 2, groups = w.rows * ((w.cols + group - 1) / group);
  const std::vector<float> scale(static_cast<size_t>(groups), 0.25f);
  std::vector<int64_t> offsets;
  std::vector<int32_t> columns;
  for (int64_t row = 0; row <= w.rows; ++row) offsets.push_back(row);
  for (int64_t row = 0; row < w.rows; ++row) columns.push_back(static_cast<int32_t>(row * 5 % w.cols));
  Codes codes{std::vector<uint8_t>(static_cast<size_t>(w.rows * row_bytes(w.cols, bits))), {}, {}, {}};
  GptqArgs args{};
  args.struct_size = sizeof(args);
  args.w = w.view();
  args.hessian = hessian.data();
  args.hessian_size = static_cast<int64_t>(hessian.size());
  args.bits = bits;
  args.group_size = group;
  args.scale = {scale.data(), 1, groups, groups, QTR_F32};
  args.damp = 0.01;
  args.ordered = ordered;
  args.exclude_row_offsets = exclude ? offsets.data() : nullptr;
  args.exclude_columns = columns.data();
  args.codes = codes.bytes.data();
  args.codes_size = static_cast<int64_t>(codes.bytes.size());
  args.result = &codes.result;
  if (!fitted) {
    gptq(args);
    return codes;
  }
  codes.scale.resize(static_cast<size_t>(groups)), codes.zero.resize(static_cast<size_t>(groups));
  args.scale = {};
  args.fitted_scale = codes.scale.data();
  args.fitted_zero = codes.zero.data();
  args.fitted_size = groups;
  args.solver = ordered ? QTR_MSE : QTR_MINMAX;
  args.half = exclude;
  gptq(args);
  return codes;
}

TEST(Gptq, IsTheSameOnEveryTargetThatFusesAndForEveryThreadCount) {
  size_t n = 0;  // dtypes in turn: each meets each value of the others
  for (int64_t cols : {1, 7, 8, 64, 65, 200})
    for (int64_t rows : {1, 31, 32, 70})
      for (int ordered : {0, 1})
        for (bool exclude : {false, true})
          for (bool fitted : {false, true}) {
            const DType dtype = cases::kDTypes[n++ % 3];
            const cases::Sample w = cases::sample("normal", rows, cols, dtype, cols % 3),
                                x = cases::sample("normal", 300, cols, QTR_F32, 0, 5);
            const std::vector<float> hessian = cases::on_reference([&] { return hessian_of(x); });
            const Codes expected =
                cases::on_reference([&] { return run(w, hessian, 3, ordered, exclude, fitted); });
            cases::on_every_target([&] {
              const Codes got = run(w, hessian, 3, ordered, exclude, fitted);
              EXPECT_NEAR(got.result.loss, expected.result.loss,
                          (fitted ? 0.1 : 1e-2) * expected.result.loss);
              if (fuses(target())) {
                EXPECT_EQ(got.bytes, expected.bytes);
                EXPECT_EQ(got.result.loss, expected.result.loss);
                EXPECT_EQ(got.scale, expected.scale);
                EXPECT_EQ(got.zero, expected.zero);
              }
            });
          }
}

// The error of the first column makes the second infinite, and a scale of 0 then makes it no number.
TEST(Gptq, ASumThatIsNoNumberGetsCodeZero) {
  const float w[] = {3e38f, 3e38f}, hessian[] = {1, 1, 1, 1}, scale[] = {1, 0};
  cases::on_every_target([&] {
    uint8_t packed[3] = {255, 255, 255}, codes[2];
    GptqResult result;
    GptqArgs args{};
    args.struct_size = sizeof(args);
    args.w = {w, 1, 2, 2, QTR_F32};
    args.hessian = hessian;
    args.hessian_size = 4;
    args.bits = 3;
    args.group_size = 1;
    args.scale = {scale, 1, 2, 2, QTR_F32};
    args.damp = 0.01;
    args.codes = packed;
    args.codes_size = sizeof(packed);
    args.result = &result;
    gptq(args);
    unpack({sizeof(UnpackArgs), packed, 1, 3, 3, codes, 2, 2});
    EXPECT_EQ(codes[0], 7);
    EXPECT_EQ(codes[1], 0);
  });
}

TEST(Gptq, RefusesWhatBreaksTheContract) {
  const cases::Sample w = cases::sample("normal", 2, 4, QTR_F32);
  const auto refused = [&](const std::vector<float>& hessian, const char* message) {
    try {
      run(w, hessian, 3, 0, false);
      ADD_FAILURE() << "accepted, expected: " << message;
    } catch (const InvalidArgument& e) {
      EXPECT_NE(std::string(e.what()).find(message), std::string::npos) << e.what();
    }
  };
  refused(std::vector<float>(9, 1), "[gptq] hessian must have a row and a column for each column of w");
  refused(std::vector<float>(16, -1),
          "[gptq] hessian must not be negative on its diagonal: got value=-1, row=0");
  std::vector<float> hessian(16, 0);
  hessian[4] = std::numeric_limits<float>::quiet_NaN();
  refused(hessian, "[gptq] hessian must be finite: got value=nan, row=1, col=0");
  float sum[4];
  EXPECT_THROW(hessian_accumulate({sizeof(HessianAccumulateArgs), {sum, 2, 2, 2, QTR_F32}, w.view()}),
               InvalidArgument);
}

}  // namespace
}  // namespace quantrature
