#include <algorithm>
#include <cstring>

#include "cases.hpp"
#include "ops/grid/line.hpp"

namespace quantrature {
namespace {

struct Result {
  std::vector<uint8_t> codes;
  std::vector<float> scale, zero, values;

  // By bits, as a zero may have a sign.
  bool same(const Result& other) const {
    const auto equal = [](const std::vector<float>& a, const std::vector<float>& b) {
      return a.size() == b.size() &&
             (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
    };
    return codes == other.codes && equal(scale, other.scale) && equal(zero, other.zero) &&
           equal(values, other.values);
  }
};

struct Settings {
  int bits;
  int64_t group_size;
  int axis;
  bool sym;
  GridSolver solver;
  bool integer_zero = false;
  qtr_scale_format scale_format = QTR_SCALE_F32;
};

int64_t packed_size(const Matrix& w, const Settings& s) {
  if (s.axis == 1) return w.rows * row_bytes(w.cols, s.bits);
  const int64_t rows = s.group_size == -1 ? w.rows : s.group_size;
  return rows * row_bytes(w.rows * w.cols / rows, s.bits);
}

Result run(const Matrix& w, const Settings& s) {
  const int64_t groups = group_count(w.rows, w.cols, s.group_size, s.axis);
  Result r;
  r.codes.resize(static_cast<size_t>(packed_size(w, s)));
  r.scale.resize(static_cast<size_t>(groups));
  r.zero.resize(s.sym ? 0 : r.scale.size());
  r.values.resize(static_cast<size_t>(w.rows * w.cols));
  QuantizeArgs args{};
  args.struct_size = sizeof(args);
  args.w = w;
  args.bits = s.bits;
  args.group_size = s.group_size;
  args.axis = s.axis;
  args.sym = s.sym;
  args.solver = s.solver;
  args.round_zero = s.solver == QTR_HQQ && s.bits == 4;
  args.integer_zero = s.integer_zero;
  args.scale_format = s.scale_format;
  args.codes = r.codes.data();
  args.codes_size = static_cast<int64_t>(r.codes.size());
  args.scale = r.scale.data();
  args.zero = s.sym ? nullptr : r.zero.data();
  args.groups = groups;
  quantize(args);
  const Matrix zero =
      s.sym ? Matrix{nullptr, 0, 0, 0, QTR_F32} : Matrix{r.zero.data(), 1, groups, groups, QTR_F32};
  dequantize({sizeof(DequantizeArgs), r.codes.data(), args.codes_size, s.bits, s.group_size, s.axis,
              Matrix{r.scale.data(), 1, groups, groups, QTR_F32}, zero,
              MutableMatrix{r.values.data(), w.rows, w.cols, w.cols, QTR_F32}});
  return r;
}

void expect_agreement(const Matrix& w, const Settings& s) {
  SCOPED_TRACE("bits " + std::to_string(s.bits) + ", group " + std::to_string(s.group_size) + ", axis " +
               std::to_string(s.axis) + ", sym " + std::to_string(s.sym) + ", solver " +
               std::to_string(s.solver));
  const Result expected = cases::on_reference([&] { return run(w, s); });
  cases::on_every_target([&] { EXPECT_TRUE(run(w, s).same(expected)); });
}

TEST(Grid, EveryTargetAgreesWithTheReferenceInEveryBit) {
  size_t n = 0;  // dtypes in turn: each meets each kind and each length
  for (const std::string& kind : cases::kKinds)
    for (int64_t cols : cases::kLengths) {
      const DType dtype = cases::kDTypes[n++ % 3];
      SCOPED_TRACE(kind + ", cols " + std::to_string(cols) + ", dtype " + std::to_string(dtype));
      cases::Sample s = cases::sample(kind, 3, cols, dtype, cols % 3);
      for (size_t i = 0; i < s.bits.size(); ++i)  // heavy tails leave the range of float16
        if (!std::isfinite(s.values[i])) s.values[i] = 1, s.bits[i] = f16_from_f32(1);
      const int bits = 1 + static_cast<int>(cols % 8);
      expect_agreement(s.view(), {bits, 64, 1, false, QTR_MINMAX});
      expect_agreement(s.view(), {bits, 17, 1, true, QTR_MINMAX});
      if (cols > 1000) continue;
      expect_agreement(s.view(), {bits, -1, 1, cols % 2 == 0, QTR_MSE});
      expect_agreement(s.view(), {bits, 48, 1, false, QTR_HQQ});
      expect_agreement(s.view(), {bits, 48, 1, false, QTR_HQQ_SCALE_FREE});
    }
}

TEST(Grid, EveryTargetAgreesOnRoundedScalesAndIntegerZeros) {
  size_t n = 0;
  for (const std::string& kind : cases::kKinds)
    for (int bits : {1, 3, 4, 8})
      for (const qtr_scale_format format : {QTR_SCALE_F32, QTR_SCALE_F16, QTR_SCALE_BF16, QTR_SCALE_E8M0}) {
        SCOPED_TRACE(kind + ", format " + std::to_string(format));
        const cases::Sample s = cases::sample(kind, 2, 330, QTR_F32);
        const int64_t group = n++ % 2 == 0 ? 64 : -1;
        for (const GridSolver solver : {QTR_MINMAX, QTR_MSE, QTR_HQQ}) {
          expect_agreement(s.view(), {bits, group, 1, false, solver, true, format});
          expect_agreement(s.view(), {bits, group, 1, false, solver, false, format});
          if (solver != QTR_HQQ) expect_agreement(s.view(), {bits, group, 1, true, solver, false, format});
        }
      }
}

TEST(Grid, GroupsOfEverySize) {
  const cases::Sample s = cases::sample("normal", 5, 700, QTR_F32);
  for (int64_t group : {1, 2, 15, 16, 33, 100, 699, 700, 5000, -1})
    for (GridSolver solver : {QTR_MINMAX, QTR_MSE, QTR_HQQ})
      for (int bits : {1, 3, 4, 8}) expect_agreement(s.view(), {bits, group, 1, false, solver});
  const cases::Sample wide = cases::sample("normal", 2, 70000, QTR_F32);
  for (int64_t group : {100, 1000, 4097, -1}) expect_agreement(wide.view(), {3, group, 1, false, QTR_MINMAX});
}

// Groups of whole vectors, whose codes go into words without a byte between. There are nine kinds and eight
// groups, so that in turn each kind meets each group, each number of bits and each number of columns.
TEST(Grid, BlocksOfEveryWidth) {
  size_t n = 0;
  for (int64_t cols : {256, 300, 576, 1024, 8448})
    for (int bits = 1; bits <= 8; ++bits)
      for (int64_t group : {8, 16, 32, 48, 64, 128, 192, -1}) {
        const std::string& kind = cases::kKinds[n % cases::kKinds.size()];
        const DType dtype = cases::kDTypes[n / cases::kKinds.size() % 3];
        SCOPED_TRACE(kind + ", cols " + std::to_string(cols) + ", dtype " + std::to_string(dtype));
        cases::Sample s = cases::sample(kind, 2, cols, dtype, cols % 5);
        for (size_t i = 0; i < s.bits.size(); ++i)
          if (!std::isfinite(s.values[i])) s.values[i] = 1, s.bits[i] = f16_from_f32(1);
        expect_agreement(s.view(), {bits, group, 1, n / 4 % 2 == 0, QTR_MINMAX});
        ++n;
      }
}

TEST(Grid, FindsWhatIsNotFiniteWhereverItIs) {
  const float infinity = std::numeric_limits<float>::infinity();
  for (int64_t group : {5, 16, 64, 96})
    for (float odd : {std::numeric_limits<float>::quiet_NaN(), infinity, -infinity})
      for (int64_t at = 0; at < 600; at += at % 64 == 63 ? 1 : 7) {
        cases::Sample s = cases::sample("normal", 1, 600, QTR_F32);
        s.values[static_cast<size_t>(at)] = odd;
        cases::on_every_target([&] {
          EXPECT_THROW(run(s.view(), {4, group, 1, at % 2 == 0, QTR_MINMAX}), InvalidArgument) << at;
        });
      }
}

TEST(Grid, RoundsToHalf) {
  for (const std::string& kind : cases::kKinds)
    for (int64_t n : cases::kLengths) {
      const cases::Sample s = cases::sample(kind, 1, n, QTR_F32);
      std::vector<uint16_t> expected;
      float least = std::numeric_limits<float>::infinity(), most = 0;
      for (float x : s.values) {
        expected.push_back(f16_from_f32(x));
        if (x != 0) least = std::min(least, std::abs(x));
        most = std::max(most, std::abs(x));
      }
      cases::on_every_target([&] {
        std::vector<uint16_t> halves(s.values.size());
        float smallest = -1, largest = -1;
        round_to_half({sizeof(RoundToHalfArgs), s.values.data(), n, halves.data(), &smallest, &largest});
        EXPECT_EQ(halves, expected);
        EXPECT_EQ(smallest, least);
        EXPECT_EQ(largest, most);
      });
    }
  float x = 1;
  uint16_t half;
  EXPECT_THROW(round_to_half({sizeof(RoundToHalfArgs), &x, 0, &half, &x, &x}), InvalidArgument);
  EXPECT_THROW(round_to_half({sizeof(RoundToHalfArgs), &x, 1, nullptr, &x, &x}), InvalidArgument);
}

TEST(Grid, ColumnsOfTheView) {
  for (DType dtype : cases::kDTypes) {
    const cases::Sample s = cases::sample("normal", 64, 210, dtype);
    for (int64_t group : {-1, 1, 4, 32, 320, 13440})
      for (GridSolver solver : {QTR_MINMAX, QTR_HQQ})
        expect_agreement(s.view(), {3, group, 0, false, solver});
  }
}

// The hqq solver shrinks only what is large: this is large.
TEST(Grid, HqqOnLargeWeights) {
  cases::Sample s = cases::sample("normal", 4, 250, QTR_F32);
  for (float& x : s.values) x *= 5;
  for (int bits : {1, 2, 3, 4}) expect_agreement(s.view(), {bits, 50, 1, false, QTR_HQQ});
}

TEST(Grid, HqqScaleFreeGivesTheSameCodesAtEveryScale) {
  const cases::Sample s = cases::sample("tails", 4, 250, QTR_F32);
  for (int bits : {2, 4, 8}) {
    const Settings settings{bits, 50, 1, false, QTR_HQQ_SCALE_FREE};
    const Result expected = run(s.view(), settings);
    for (int power : {-90, -40, -15, 5, 30, 90}) {
      cases::Sample scaled = s;
      for (float& x : scaled.values) x = std::ldexp(x, power);
      const Result r = run(scaled.view(), settings);
      EXPECT_EQ(r.codes, expected.codes) << power;
      for (size_t g = 0; g < r.scale.size(); ++g)
        EXPECT_EQ(r.scale[g], std::ldexp(expected.scale[g], power)) << power;
    }
  }
}

TEST(Grid, HqqScaleFreeIsHqqOnSmallErrors) {
  cases::Sample s = cases::sample("normal", 6, 320, QTR_F32);
  for (float& x : s.values) x *= 0.05f;
  for (int bits : {2, 3, 5})
    EXPECT_TRUE(run(s.view(), {bits, 64, 1, false, QTR_HQQ})
                    .same(run(s.view(), {bits, 64, 1, false, QTR_HQQ_SCALE_FREE})));
}

// Codes on another grid than the fitted one, against the formula of grid.hpp.
TEST(Grid, CodesOnAGivenGrid) {
  for (int axis : {0, 1})
    for (int64_t group : {8, 20, -1})
      for (bool sym : {false, true}) {
        const cases::Sample s = cases::sample("normal", 8, 40, QTR_F32);
        const Settings settings{3, group, axis, sym, QTR_GIVEN};
        const auto groups = static_cast<size_t>(group_count(8, 40, group, axis));
        std::vector<float> scale(groups), zero(groups);
        for (size_t g = 0; g < groups; ++g) scale[g] = 0.1f + 0.01f * static_cast<float>(g), zero[g] = 2.25f;
        scale[groups - 1] = 0;
        std::vector<uint8_t> expected(8 * 40);
        for (int64_t i = 0; i < 8 * 40; ++i) {
          const int64_t size = group == -1 ? (axis == 1 ? 40 : 8) : group;
          const int64_t g = axis == 0 ? i % (8 * 40 / size) : i / 40 * (40 / size) + i % 40 / size;
          const float step = scale[static_cast<size_t>(g)], offset = sym ? 4 : zero[static_cast<size_t>(g)];
          const float inv = step == 0 ? 0 : 1 / step;
          expected[static_cast<size_t>(i)] = static_cast<uint8_t>(
              std::clamp(std::nearbyint(s.values[static_cast<size_t>(i)] * inv + offset), 0.0f, 7.0f));
        }
        cases::on_every_target([&] {
          std::vector<uint8_t> codes(static_cast<size_t>(packed_size(s.view(), settings))), plain(8 * 40);
          QuantizeArgs args{};
          args.struct_size = sizeof(args);
          args.w = s.view();
          args.bits = 3, args.group_size = group, args.axis = axis, args.sym = sym;
          args.solver = QTR_GIVEN;
          args.codes = codes.data(), args.codes_size = static_cast<int64_t>(codes.size());
          args.scale = scale.data(), args.zero = sym ? nullptr : zero.data();
          args.groups = static_cast<int64_t>(groups);
          quantize(args);
          const int64_t rows = axis == 1 ? 8 : group == -1 ? 8 : group, cols = 8 * 40 / rows;
          unpack({sizeof(UnpackArgs), codes.data(), rows, row_bytes(cols, 3), 3, plain.data(), cols, cols});
          EXPECT_EQ(plain, expected) << "axis " << axis << ", group " << group << ", sym " << sym;
        });
      }
}

TEST(Grid, ValuesAreHalfAStepAway) {
  const cases::Sample s = cases::sample("normal", 3, 1000, QTR_F32);
  for (int bits = 1; bits <= 8; ++bits) {
    const Result r = run(s.view(), {bits, 100, 1, false, QTR_MINMAX});
    for (int64_t row = 0; row < 3; ++row)
      for (int64_t col = 0; col < 1000; ++col) {
        const auto at = static_cast<size_t>(row * 1000 + col);
        const double step = static_cast<double>(r.scale[static_cast<size_t>(row * 10 + col / 100)]);
        EXPECT_NEAR(r.values[at], s.at(row, col), 0.5001 * step);
      }
  }
}

TEST(Grid, PowerIsThePower) {
  for (double x = 1e-30; x < 1e38; x *= 1.37)
    EXPECT_NEAR(power_minus_0_3(x) / std::pow(x, -0.3), 1, 1e-14) << x;
}

TEST(Grid, ShrinksAsDefined) {
  for (int i = 0; i < 20; ++i) {
    const double beta = 10 * std::pow(1.01, i);
    for (double d = 0.01; d < 4; d *= 1.1) {
      const double expected = std::max(0.0, d - std::pow(d, -0.3) / beta);
      EXPECT_NEAR(shrink(static_cast<float>(d), beta), expected, 1e-6);
      EXPECT_NEAR(shrink(static_cast<float>(-d), beta), -expected, 1e-6);
    }
  }
}

TEST(Grid, ExcludedPositionsAreNotFitted) {
  std::vector<float> w = {0, 1, 2, 50, 3, 0, -7, 1};
  const int64_t offsets[] = {0, 1, 2};
  const int32_t columns[] = {3, 2};
  uint8_t codes[8];
  float scale[2], zero[2];
  QuantizeArgs args{};
  args.struct_size = sizeof(args);
  args.w = Matrix{w.data(), 2, 4, 4, QTR_F32};
  args.bits = 2, args.group_size = 4, args.axis = 1;
  args.exclude_row_offsets = offsets, args.exclude_columns = columns;
  args.codes = codes, args.codes_size = 4;
  args.scale = scale, args.zero = zero, args.groups = 2;
  cases::on_every_target([&] {
    quantize(args);
    EXPECT_FLOAT_EQ(scale[0], 2.0f / 3);
    EXPECT_FLOAT_EQ(scale[1], 1);
    uint8_t plain[8];
    unpack({sizeof(UnpackArgs), codes, 2, 2, 2, plain, 4, 4});
    EXPECT_EQ(plain[3], 3);
    EXPECT_EQ(plain[6], 0);
  });
}

TEST(Grid, RefusesWhatBreaksTheContract) {
  const auto refused = [](auto call, const char* message) {
    try {
      call();
      ADD_FAILURE() << "accepted, expected: " << message;
    } catch (const InvalidArgument& e) {
      EXPECT_NE(std::string(e.what()).find(message), std::string::npos) << e.what();
    }
  };
  float w[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  uint8_t codes[8];
  float scale[2], zero[2], values[8];
  const int64_t offsets[] = {0, 1, 1}, late[] = {1, 1, 1}, falling[] = {0, 1, 0};
  const int32_t columns[] = {4};
  QuantizeArgs good{};
  good.struct_size = sizeof(good);
  good.w = Matrix{w, 2, 4, 4, QTR_F32};
  good.bits = 4, good.group_size = -1, good.axis = 1;
  good.codes = codes, good.codes_size = 8;
  good.scale = scale, good.zero = zero, good.groups = 2;
  quantize(good);
  const auto bad_quantize = [&](auto change, const char* message) {
    QuantizeArgs bad = good;
    change(bad);
    refused([&] { quantize(bad); }, message);
  };
  bad_quantize([](auto& a) { a.w.cols = 0; }, "[quantize] w must not be empty");
  bad_quantize([](auto& a) { a.bits = 9; }, "[quantize] bits must be 1 to 8: got bits=9");
  bad_quantize([](auto& a) { a.solver = static_cast<GridSolver>(5); },
               "[quantize] solver must be minmax, mse, hqq, hqq-scale-free or given: got solver=5");
  bad_quantize([](auto& a) { a.axis = 2; }, "[quantize] axis must be 0 or 1: got axis=2");
  bad_quantize([](auto& a) { a.group_size = 0; },
               "[quantize] group_size must be -1 or at least 1: got group_size=0");
  bad_quantize([](auto& a) { a.axis = 0, a.group_size = 3; },
               "[quantize] group_size must divide the size on axis 0");
  bad_quantize([](auto& a) { a.axis = 0, a.w.cols = 2; },
               "[quantize] w must have no gaps between rows on axis 0");
  bad_quantize([](auto& a) { a.sym = 1, a.solver = QTR_HQQ; }, "[quantize] solver hqq fits the zero");
  bad_quantize([](auto& a) { a.solver = QTR_GIVEN, a.round_zero = 1; },
               "[quantize] round_zero goes without a given grid");
  bad_quantize([](auto& a) { a.sym = 1, a.round_zero = 1; }, "[quantize] round_zero goes without sym");
  bad_quantize([](auto& a) { a.sym = 1, a.integer_zero = 1; }, "[quantize] integer_zero goes without sym");
  bad_quantize([](auto& a) { a.scale_format = static_cast<qtr_scale_format>(4); },
               "[quantize] scale_format must be f32, f16, bf16 or e8m0");
  bad_quantize([](auto& a) { a.solver = QTR_GIVEN, a.integer_zero = 1; },
               "[quantize] integer_zero and scale_format go without a given grid");
  bad_quantize([](auto& a) { a.codes_size = 7; },
               "[quantize] codes must hold all packed rows: got codes_size=7, expected=8");
  bad_quantize([](auto& a) { a.groups = 3; },
               "[quantize] scale must hold one number for each group: got groups=3");
  bad_quantize([](auto& a) { a.zero = nullptr; }, "[quantize] zero must not be null");
  bad_quantize([&](auto& a) { a.exclude_row_offsets = offsets; },
               "[quantize] exclude_columns must not be null");
  bad_quantize([&](auto& a) { a.exclude_row_offsets = offsets, a.exclude_columns = columns; },
               "[quantize] exclude must lie within w: got row=0, col=4");
  bad_quantize([&](auto& a) { a.exclude_row_offsets = late, a.exclude_columns = columns; },
               "[quantize] exclude must have row_offsets from 0: got row_offset=1");
  const int32_t inside[] = {0};
  bad_quantize([&](auto& a) { a.exclude_row_offsets = falling, a.exclude_columns = inside; },
               "[quantize] exclude must have row_offsets that ascend: got row=1");
  cases::on_every_target([&] {
    w[6] = std::numeric_limits<float>::quiet_NaN();
    bad_quantize([](auto&) {}, "[quantize] w must be finite: got value=nan, row=1, col=2");
    w[6] = -std::numeric_limits<float>::infinity();
    bad_quantize([](auto& a) { a.axis = 0, a.solver = QTR_HQQ, a.groups = 4, a.codes_size = 8; },
                 "[quantize] w must be finite: got value=-inf, row=1, col=2");
    bad_quantize([&](auto& a) { a.exclude_row_offsets = offsets, a.exclude_columns = inside; },
                 "[quantize] w must be finite");
    w[6] = 3e38f, w[4] = -3e38f;
    bad_quantize([](auto& a) { a.solver = QTR_MSE; },
                 "[quantize] the range of a group must be finite in float32: got first_group=1");
    w[6] = 7, w[4] = 5;
  });

  const DequantizeArgs fine{sizeof(DequantizeArgs),
                            codes,
                            8,
                            4,
                            -1,
                            1,
                            Matrix{scale, 1, 2, 2, QTR_F32},
                            Matrix{zero, 2, 1, 1, QTR_F32},
                            MutableMatrix{values, 2, 4, 4, QTR_F32}};
  quantize(good);
  dequantize(fine);
  const auto bad_dequantize = [&](auto change, const char* message) {
    DequantizeArgs bad = fine;
    change(bad);
    refused([&] { dequantize(bad); }, message);
  };
  bad_dequantize([](auto& a) { a.bits = 0; }, "[dequantize] bits must be 1 to 8: got bits=0");
  bad_dequantize([](auto& a) { a.axis = -1; }, "[dequantize] axis must be 0 or 1: got axis=-1");
  bad_dequantize([](auto& a) { a.group_size = -3; }, "[dequantize] group_size must be -1 or at least 1");
  bad_dequantize([](auto& a) { a.out.data = nullptr; }, "[dequantize] out must not be null");
  bad_dequantize([](auto& a) { a.axis = 0, a.out.cols = 2; },
                 "[dequantize] out must have no gaps between rows on axis 0");
  bad_dequantize([](auto& a) { a.codes_size = 9; },
                 "[dequantize] codes must hold all packed rows: got codes_size=9");
  bad_dequantize(
      [](auto& a) { a.scale.cols = a.scale.row_stride = 3; },
      "[dequantize] scale and zero must hold one number for each group, without gaps: got groups=3");
  bad_dequantize([](auto& a) { a.zero.row_stride = 2; }, "[dequantize] scale and zero must hold one number");
  refused([] { group_count(0, 1, 1, 1); }, "[group_count] the matrix must not be empty");
}

}  // namespace
}  // namespace quantrature
