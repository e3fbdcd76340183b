// Products of codes of a codebook.
#include <cmath>
#include <cstring>

#include "cases.hpp"

namespace quantrature {
namespace {

struct Kind {
  int bits;
  int64_t group_size;  // 0: no scales
  bool table_per_row;
  DType dtype = QTR_F32;  // of table and scales
};

// Random codes, with every seventh weight of every row kept beside them.
struct Coded {
  int64_t rows, cols;
  Kind kind;
  cases::Sample table, scale;
  std::vector<uint8_t> codes;
  std::vector<float> dense, values, residual;  // dense: of the codes alone
  std::vector<uint16_t> columns;
  std::vector<int32_t> row_offsets{0};

  Coded(int64_t rows_, int64_t cols_, Kind k)
      : rows(rows_),
        cols(cols_),
        kind(k),
        table(cases::sample("tails", k.table_per_row ? rows : 1, int64_t{1} << k.bits, k.dtype, 3)),
        scale(cases::sample("normal", rows, k.group_size == 0 ? 1 : per_row(), k.dtype)),
        codes(static_cast<size_t>(rows * row_bytes(cols, k.bits))),
        dense(static_cast<size_t>(rows * cols)) {
    std::mt19937 generator(static_cast<unsigned>(rows + cols));
    std::vector<uint8_t> unpacked(dense.size());
    for (uint8_t& code : unpacked) code = static_cast<uint8_t>(generator() % (1u << k.bits));
    pack(
        {sizeof(PackArgs), unpacked.data(), rows, cols, cols, k.bits, codes.data(), row_bytes(cols, k.bits)});
    for (int64_t row = 0, i = 0; row < rows; ++row)
      for (int64_t col = 0; col < cols; ++col, ++i) {
        const float entry = table.at(k.table_per_row ? row : 0, unpacked[static_cast<size_t>(i)]);
        const int64_t group = k.group_size < 1 ? cols : k.group_size;
        dense[static_cast<size_t>(i)] = k.group_size == 0 ? entry : entry * scale.at(row, col / group);
      }
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t col = row % 7; col < cols; col += 7) {
        columns.push_back(static_cast<uint16_t>(col));
        values.push_back(static_cast<float>(row) - 0.3f * static_cast<float>(col % 11));
      }
      row_offsets.push_back(static_cast<int32_t>(columns.size()));
    }
    residual.resize(values.size());
    residuals(residual_args(residual));
  }

  int64_t per_row() const {
    const int64_t group = kind.group_size < 1 ? cols : std::min(kind.group_size, cols);
    return (cols + group - 1) / group;
  }
  GridMatrix matrix() const {
    return {codes.data(),
            static_cast<int64_t>(codes.size()),
            rows,
            cols,
            kind.bits,
            kind.group_size,
            kind.group_size == 0 ? Matrix{} : scale.view(),
            {}};
  }
  Csr csr(const std::vector<float>& v) const {
    return {v.data(), columns.data(), row_offsets.data(), rows, cols, static_cast<int64_t>(v.size()),
            QTR_F32};
  }
  ResidualsArgs residual_args(std::vector<float>& out) const {
    return {sizeof(ResidualsArgs), matrix(), csr(values), out.data(), {}, table.view()};
  }
  MatvecArgs args(const cases::Sample& x, std::vector<float>& y,
                  qtr_activations how = QTR_ACTIVATIONS_FLOAT32) const {
    return {sizeof(MatvecArgs),
            matrix(),
            csr(residual),
            x.view(),
            MutableMatrix{y.data(), x.rows, rows, rows, QTR_F32},
            how,
            {},
            table.view()};
  }
  std::vector<float> times(const cases::Sample& x, qtr_activations how = QTR_ACTIVATIONS_FLOAT32) const {
    std::vector<float> y(static_cast<size_t>(x.rows * rows), std::numeric_limits<float>::quiet_NaN());
    matvec(args(x, y, how));
    return y;
  }

  // What the header promises, with the values of the outliers in place: on every target.
  void expect_product(const cases::Sample& x, qtr_activations how = QTR_ACTIVATIONS_FLOAT32) const {
    const long double fused = 0x1p-23L * (static_cast<long double>(cols) / 8 + 32);
    std::vector<long double> sums, bounds;
    for (int64_t v = 0; v < x.rows; ++v) {
      std::vector<long double> largest(static_cast<size_t>(cols / 64 + 1));  // of each run
      for (int64_t col = 0; col < cols; ++col) {
        long double& m = largest[static_cast<size_t>(col / 64)];
        m = std::max(m, std::abs(static_cast<long double>(x.at(v, col))));
      }
      for (int64_t row = 0, kept = 0; row < rows; ++row) {
        long double sum = 0, bound = 0;
        for (int64_t col = 0; col < cols; ++col) {
          const long double image = dense[static_cast<size_t>(row * cols + col)], at = x.at(v, col);
          const bool outlier = col % 7 == row % 7;
          const long double value = outlier ? values[static_cast<size_t>(kept++)] : image;
          sum += value * at;
          bound += fused * (std::abs(image) + std::abs(value - image)) * std::abs(at);
          if (how == QTR_ACTIVATIONS_INT8)
            bound +=
                ((1 + 0x1p-16L) * largest[static_cast<size_t>(col / 64)] / 254 + 0x1p-110L) * std::abs(image);
        }
        sums.push_back(sum);
        bounds.push_back(bound);
      }
    }
    cases::on_every_target([&] {
      const std::vector<float> y = times(x, how);
      for (size_t i = 0; i < y.size(); ++i)
        ASSERT_LE(std::abs(static_cast<long double>(y[i]) - sums[i]), bounds[i]) << i;
    });
  }
};

TEST(MatvecTables, IsWithinTheBoundOnEveryTarget) {
  for (int bits = 1; bits <= 8; ++bits)
    for (int64_t cols : {5, 256, 330, 776})
      for (int64_t group : {0, -1, 7, 32, 64, 96})
        for (bool per_row : {false, true}) {
          SCOPED_TRACE("bits " + std::to_string(bits) + ", cols " + std::to_string(cols) + ", group " +
                       std::to_string(group) + (per_row ? ", tables of rows" : ""));
          const Coded coded(6, cols, {bits, group, per_row});
          const cases::Sample x = cases::sample("normal", bits % 2 == 1 ? 5 : 2, cols, QTR_F32, 3);
          coded.expect_product(x);
          coded.expect_product(x, QTR_ACTIVATIONS_INT8);
        }
}

TEST(MatvecTables, TakesHalvesAsTheNumbersTheyAre) {
  for (DType dtype : {QTR_F16, QTR_BF16})
    for (bool per_row : {false, true})
      for (int64_t group : {0, 64}) {
        const Coded coded(70, 1032, {3, group, per_row, dtype});
        const cases::Sample x = cases::sample("normal", 2, 1032, dtype, 1);
        coded.expect_product(x);
      }
}

TEST(MatvecTables, TakesTinyAndHugeVectors) {
  const Coded coded(5, 600, {4, 64, false});
  for (const char* kind : {"tiny", "huge", "outlier", "zero"}) {
    const cases::Sample x = cases::sample(kind, 2, 600, QTR_F32);
    coded.expect_product(x);
  }
}

TEST(MatvecTables, ThreadsAndOtherVectorsChangeNothing) {
  for (const Kind& kind : std::vector<Kind>{{4, 64, false}, {3, 0, true}, {5, 64, false}}) {
    const Coded coded(150, 520, kind);
    const cases::Sample all = cases::sample("normal", 23, 520, QTR_F32);
    std::vector<float> expected;
    std::string of;
    cases::on_every_target([&] {
      const std::vector<float> y = coded.times(all);
      if (of == target()) {
        EXPECT_EQ(y, expected);
      }
      of = target(), expected = y;
      for (int64_t v : {0, 3, 16, 22}) {
        cases::Sample one = all;
        one.rows = 1;
        one.values.assign(all.values.begin() + v * 520, all.values.begin() + (v + 1) * 520);
        const std::vector<float> alone = coded.times(one);
        EXPECT_EQ(std::memcmp(alone.data(), y.data() + v * 150, 150 * sizeof(float)), 0) << v;
      }
    });
  }
}

TEST(MatvecTables, SpreadsWhatIsNotFinite) {
  const Coded coded(5, 600, {4, 64, false});
  cases::expect_what_is_not_finite_to_spread(
      [&](const cases::Sample& x, qtr_activations how) { return coded.times(x, how); });
}

TEST(MatvecTables, ResidualsAreWhatTheValuesAddToTheEntries) {
  for (const Kind& kind : std::vector<Kind>{{2, 0, true}, {4, 64, false, QTR_F16}, {8, -1, true, QTR_BF16}}) {
    const Coded coded(3, 9000, kind);
    cases::on_every_target([&] {
      std::vector<float> out(coded.values.size());
      residuals(coded.residual_args(out));
      size_t i = 0;
      for (int64_t row = 0; row < 3; ++row)
        for (int64_t col = row % 7; col < 9000; col += 7, ++i)
          ASSERT_EQ(out[i], coded.values[i] - coded.dense[static_cast<size_t>(row * 9000 + col)]);
    });
  }
}

}  // namespace
}  // namespace quantrature
