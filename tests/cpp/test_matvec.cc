#include <cmath>
#include <cstring>

#include "cases.hpp"

namespace quantrature {
namespace {

// A quantized sample with every seventh weight of every row kept beside it.
struct Packed {
  cases::Sample w;
  int bits;
  int64_t group_size, groups;
  std::vector<uint8_t> codes, unpacked;
  std::vector<float> scale, zero, values, residual;
  std::vector<uint16_t> columns;
  std::vector<int32_t> row_offsets;

  Packed(const std::string& kind, int64_t rows, int64_t cols, int bits_, int64_t group)
      : w(cases::sample(kind, rows, cols, QTR_F32)),
        bits(bits_),
        group_size(group),
        groups(group_count(rows, cols, group, 1)),
        codes(static_cast<size_t>(rows * row_bytes(cols, bits))),
        unpacked(static_cast<size_t>(rows * cols)),
        scale(static_cast<size_t>(groups)),
        zero(static_cast<size_t>(groups)) {
    QuantizeArgs args{};
    args.struct_size = sizeof(args);
    args.w = w.view();
    args.bits = bits;
    args.group_size = group_size;
    args.axis = 1;
    args.codes = codes.data();
    args.codes_size = static_cast<int64_t>(codes.size());
    args.scale = scale.data();
    args.zero = zero.data();
    args.groups = groups;
    quantize(args);
    unpack(
        {sizeof(UnpackArgs), codes.data(), rows, row_bytes(cols, bits), bits, unpacked.data(), cols, cols});
    row_offsets.push_back(0);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t column = row % 7; column < cols; column += 7) {
        columns.push_back(static_cast<uint16_t>(column));
        values.push_back(w.at(row, column));
      }
      row_offsets.push_back(static_cast<int32_t>(columns.size()));
    }
    residual.resize(values.size());
    residuals({sizeof(ResidualsArgs), grid(), csr(values), residual.data()});
  }

  GridMatrix grid() const {
    const int64_t per_row = groups / w.rows;
    return {codes.data(),
            static_cast<int64_t>(codes.size()),
            w.rows,
            w.cols,
            bits,
            group_size,
            {scale.data(), w.rows, per_row, per_row, QTR_F32},
            {zero.data(), w.rows, per_row, per_row, QTR_F32}};
  }
  Csr csr(const std::vector<float>& v) const {
    return {v.data(), columns.data(), row_offsets.data(), w.rows, w.cols, static_cast<int64_t>(v.size()),
            QTR_F32};
  }
  size_t group_of(int64_t row, int64_t col) const {
    const int64_t group = group_size == -1 ? w.cols : std::min(group_size, w.cols);
    return static_cast<size_t>(row * (groups / w.rows) + col / group);
  }

  std::vector<float> times(const cases::Sample& x, qtr_activations how = QTR_ACTIVATIONS_FLOAT32) const {
    std::vector<float> y(static_cast<size_t>(x.rows * w.rows), std::numeric_limits<float>::quiet_NaN());
    matvec({sizeof(MatvecArgs), grid(), csr(residual), x.view(),
            MutableMatrix{y.data(), x.rows, w.rows, w.rows, QTR_F32}, how});
    return y;
  }

  // What the header promises, with the values of the outliers in place.
  void expect_product(const cases::Sample& x, qtr_activations how = QTR_ACTIVATIONS_FLOAT32) const {
    const std::vector<float> y = times(x, how);
    const long double fused = 0x1p-23L * (static_cast<long double>(w.cols) / 8 + 32);
    for (int64_t v = 0; v < x.rows; ++v)
      for (int64_t row = 0; row < w.rows; ++row) {
        long double sum = 0, bound = 0;
        for (int64_t col = 0; col < w.cols; ++col) {
          const size_t g = group_of(row, col);
          const long double s = scale[g], z = zero[g],
                            code = unpacked[static_cast<size_t>(row * w.cols + col)];
          const long double image = (code - z) * s, at = x.at(v, col);
          const long double value = col % 7 == row % 7 ? static_cast<long double>(w.at(row, col)) : image;
          sum += value * at;
          const long double size = (code + std::abs(z)) * std::abs(s), m = largest(x, v, col / 64 * 64);
          bound += fused * (size + std::abs(value - image)) * std::abs(at);
          bound += 0x1p-22L * code * std::abs(s) * m + 0x1p-110L * std::abs(s);
          if (how == QTR_ACTIVATIONS_INT8)
            bound += ((1 + 0x1p-16L) * std::abs(image) + fused * size) * m / 254 + 0x1p-110L * std::abs(s);
        }
        const float got = y[static_cast<size_t>(v * w.rows + row)];
        ASSERT_LE(std::abs(static_cast<long double>(got) - sum), bound) << "row " << row << ", vector " << v;
      }
  }

  long double largest(const cases::Sample& x, int64_t v, int64_t begin) const {
    long double m = 0;
    for (int64_t col = begin; col < std::min(begin + 64, w.cols); ++col)
      m = std::max(m, std::abs(static_cast<long double>(x.at(v, col))));
    return m;
  }
};

TEST(Matvec, IsWithinTheBoundOnEveryTarget) {
  for (int bits = 1; bits <= 8; ++bits)
    for (int64_t cols : {5, 64, 192, 256, 330, 450, 640, 768})
      for (int64_t group : {-1, 7, 32, 64, 96}) {
        SCOPED_TRACE("bits " + std::to_string(bits) + ", cols " + std::to_string(cols) + ", group " +
                     std::to_string(group));
        const Packed packed("tails", 6, cols, bits, group);
        const cases::Sample x = cases::sample("normal", 3, cols, QTR_F32, 3);
        cases::on_every_target([&] {
          packed.expect_product(x);
          packed.expect_product(x, QTR_ACTIVATIONS_INT8);
        });
      }
}

TEST(Matvec, TheSizesOfATableThatIsNotThereAreNotRead) {
  const Packed packed("normal", 4, 100, 4, 64);
  const cases::Sample x = cases::sample("normal", 1, 100, QTR_F32);
  std::vector<float> y(4);
  MatvecArgs args{sizeof(MatvecArgs), packed.grid(), packed.csr(packed.residual), x.view(),
                  MutableMatrix{y.data(), 1, 4, 4, QTR_F32}};
  args.table = Matrix{nullptr, 1, -1, 0, QTR_F16};
  matvec(args);
  EXPECT_EQ(y, packed.times(x));
}

TEST(Matvec, KeepsTheBoundForTheLargestCodesAndNumbers) {
  for (int bits = 1; bits <= 8; ++bits) {
    Packed packed("normal", 4, 512, bits, 64);
    std::fill(packed.codes.begin(), packed.codes.end(), uint8_t{255});
    std::fill(packed.unpacked.begin(), packed.unpacked.end(), static_cast<uint8_t>((1 << bits) - 1));
    residuals({sizeof(ResidualsArgs), packed.grid(), packed.csr(packed.values), packed.residual.data()});
    for (float sign : {1.0f, -1.0f})
      for (float size : {1.0f, 1.99999988f, 1.9921875f, 1e-30f, 1e30f}) {
        cases::Sample x = cases::sample("normal", 1, 512, QTR_F32);
        for (int64_t col = 0; col < 512; ++col)
          x.values[static_cast<size_t>(col)] = sign * size * (col % 129 == 128 ? 1e-3f : 1.0f);
        cases::on_every_target([&] {
          packed.expect_product(x);
          packed.expect_product(x, QTR_ACTIVATIONS_INT8);
        });
      }
  }
}

TEST(Matvec, TakesHalvesAsTheNumbersTheyAre) {
  const Packed packed("normal", 6, 520, 3, 64);
  for (DType dtype : cases::kDTypes) {
    const cases::Sample x = cases::sample("normal", 2, 520, dtype, 1);
    cases::on_every_target([&] { packed.expect_product(x); });
  }
}

TEST(Matvec, RoundsResultsToHalves) {
  const Packed packed("normal", 70, 520, 4, 64);
  const cases::Sample x = cases::sample("normal", 19, 520, QTR_F32, 1);
  for (DType dtype : {QTR_F16, QTR_BF16})
    cases::on_every_target([&] {
      const std::vector<float> wide = packed.times(x);
      std::vector<uint16_t> halves(wide.size());
      matvec({sizeof(MatvecArgs), packed.grid(), packed.csr(packed.residual), x.view(),
              MutableMatrix{halves.data(), 19, 70, 70, dtype}, QTR_ACTIVATIONS_FLOAT32});
      for (size_t i = 0; i < wide.size(); ++i)
        ASSERT_EQ(halves[i], dtype == QTR_F16 ? f16_from_f32(wide[i]) : bf16_from_f32(wide[i]));
    });
}

TEST(Matvec, ThreadsAndOtherVectorsChangeNothing) {
  const Packed packed("normal", 150, 520, 4, 64);
  const cases::Sample all = cases::sample("normal", 300, 520, QTR_F32);
  for (qtr_activations how : {QTR_ACTIVATIONS_FLOAT32, QTR_ACTIVATIONS_INT8}) {
    std::vector<float> expected;
    std::string of;
    cases::on_every_target([&] {
      const std::vector<float> y = packed.times(all, how);
      if (of == target()) {
        EXPECT_EQ(y, expected);
      }
      of = target(), expected = y;
      for (int64_t v : {0, 3, 16, 17, 255, 256, 299}) {
        cases::Sample one = all;
        one.rows = 1;
        one.values.assign(all.values.begin() + v * 520, all.values.begin() + (v + 1) * 520);
        const std::vector<float> alone = packed.times(one, how);
        EXPECT_EQ(std::memcmp(alone.data(), y.data() + v * 150, 150 * sizeof(float)), 0) << v;
      }
    });
  }
}

TEST(Matvec, SpreadsWhatIsNotFinite) {
  const Packed packed("normal", 5, 600, 3, 64);
  cases::expect_what_is_not_finite_to_spread(
      [&](const cases::Sample& x, qtr_activations how) { return packed.times(x, how); });
}

TEST(Residuals, AreWhatTheValuesAddToTheGrid) {
  for (int bits : {1, 3, 4, 8}) {
    const Packed packed("tails", 3, 9000, bits, 64);
    size_t i = 0;
    for (int64_t row = 0; row < 3; ++row)
      for (int64_t col = row % 7; col < 9000; col += 7, ++i) {
        const size_t g = packed.group_of(row, col);
        const float code = packed.unpacked[static_cast<size_t>(row * 9000 + col)];
        const float image = (code - packed.zero[g]) * packed.scale[g];
        ASSERT_EQ(packed.residual[i], packed.values[i] - image);
      }
  }
}

TEST(Residuals, AreTheSameEverywhere) {
  const Packed packed("normal", 40, 5000, 3, 64);
  cases::on_every_target([&] {
    std::vector<float> out(packed.values.size());
    residuals({sizeof(ResidualsArgs), packed.grid(), packed.csr(packed.values), out.data()});
    EXPECT_EQ(out, packed.residual);
  });
}

template <class Call>
void refused(Call&& call, const char* message) {
  try {
    call();
    ADD_FAILURE() << "accepted, expected: " << message;
  } catch (const InvalidArgument& e) {
    EXPECT_NE(std::string(e.what()).find(message), std::string::npos) << e.what();
  }
}

TEST(Matvec, RefusesWhatBreaksTheContract) {
  const Packed packed("normal", 3, 100, 4, 32);
  const cases::Sample x = cases::sample("normal", 2, 100, QTR_F32);
  std::vector<float> y(6);
  const MatvecArgs good{sizeof(MatvecArgs),
                        packed.grid(),
                        packed.csr(packed.residual),
                        x.view(),
                        MutableMatrix{y.data(), 2, 3, 3, QTR_F32},
                        QTR_ACTIVATIONS_FLOAT32};
  matvec(good);
  const auto refuses = [&](auto&& change, const char* message) {
    MatvecArgs bad = good;
    change(bad);
    refused([&] { matvec(bad); }, message);
  };
  refuses([](MatvecArgs& a) { a.w.rows = 0; }, "[matvec] w must not be empty: got rows=0");
  refuses([](MatvecArgs& a) { a.w.bits = 9; }, "[matvec] bits must be 1 to 8: got bits=9");
  refuses([](MatvecArgs& a) { a.w.group_size = 0; }, "[matvec] group_size must be -1 or at least 1");
  refuses([](MatvecArgs& a) { a.w.codes_size -= 1; }, "[matvec] codes must hold all packed rows");
  refuses([](MatvecArgs& a) { a.w.scale.cols -= 1; }, "[matvec] scale and zero must hold one number");
  refuses([](MatvecArgs& a) { a.w.zero.rows -= 1; }, "[matvec] scale and zero must hold one number");
  refuses([](MatvecArgs& a) { a.w.scale.data = nullptr; }, "[matvec] scale must not be null");
  refuses([](MatvecArgs& a) { a.x.rows = 0; }, "[matvec] x must not be empty");
  refuses([](MatvecArgs& a) { a.x.cols = 99; }, "[matvec] x must have as many numbers as w has columns");
  refuses([](MatvecArgs& a) { a.out.rows = 1; }, "[matvec] out must have a row for each vector");
  refuses([](MatvecArgs& a) { a.activations = static_cast<qtr_activations>(2); },
          "[matvec] activations must be float32 or int8: got activations=2");
  refuses([](MatvecArgs& a) { a.residuals.rows = 4; }, "[matvec] residuals must have the shape of w");
  refuses([](MatvecArgs& a) { a.residuals.dtype = QTR_F16; }, "[matvec] residuals must be float32");
}

TEST(Residuals, RefusesWhatBreaksTheContract) {
  const Packed packed("normal", 3, 100, 4, 32);
  std::vector<float> out(packed.values.size());
  const ResidualsArgs good{sizeof(ResidualsArgs), packed.grid(), packed.csr(packed.values), out.data()};
  residuals(good);
  const auto refuses = [&](auto&& change, const char* message) {
    ResidualsArgs bad = good;
    change(bad);
    refused([&] { residuals(bad); }, message);
  };
  refuses([](ResidualsArgs& a) { a.w.bits = 0; }, "[residuals] bits must be 1 to 8: got bits=0");
  refuses([](ResidualsArgs& a) { a.out = nullptr; }, "[residuals] out must not be null");
  refuses([](ResidualsArgs& a) { a.outliers.nnz -= 1; }, "[csr] row_offsets must end with");
  refuses([](ResidualsArgs& a) { a.outliers.cols += 1; }, "[residuals] outliers must have the shape of w");
  refuses([](ResidualsArgs& a) { a.outliers.dtype = static_cast<qtr_dtype>(7); },
          "[residuals] outliers must be float32, float16 or bfloat16: got dtype=7");
}

}  // namespace
}  // namespace quantrature
