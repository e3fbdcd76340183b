#include <algorithm>
#include <cstring>

#include "cases.hpp"
#include "runtime/dispatch.hpp"

namespace quantrature {
namespace {

struct Split {
  std::vector<float> remainder;
  std::vector<float> values;
  std::vector<uint16_t> columns;
  std::vector<int32_t> row_offsets;

  bool operator==(const Split&) const = default;
};

// Of a float32 sample with at most 65536 columns, into a remainder without padding.
Split run(const cases::Sample& s, int64_t count, bool per_row, const int64_t* indices = nullptr) {
  const size_t nnz = static_cast<size_t>(per_row ? count * s.rows : count);
  Split out{std::vector<float>(static_cast<size_t>(s.rows * s.cols)), std::vector<float>(nnz),
            std::vector<uint16_t>(nnz), std::vector<int32_t>(static_cast<size_t>(s.rows) + 1)};
  extract_outliers({sizeof(OutliersArgs), s.view(), count, per_row, indices,
                    MutableMatrix{out.remainder.data(), s.rows, s.cols, s.cols, QTR_F32}, out.values.data(),
                    out.columns.data(), out.row_offsets.data()});
  check_csr({out.values.data(), out.columns.data(), out.row_offsets.data(), s.rows, s.cols,
             static_cast<int64_t>(nnz), QTR_F32});
  return out;
}

void expect_whole(const cases::Sample& s, const Split& split) {
  std::vector<float> whole = split.remainder;
  for (int64_t row = 0; row < s.rows; ++row) {
    for (int32_t i = split.row_offsets[static_cast<size_t>(row)];
         i < split.row_offsets[static_cast<size_t>(row) + 1]; ++i) {
      const size_t at = static_cast<size_t>(row * s.cols + split.columns[static_cast<size_t>(i)]);
      EXPECT_EQ(whole[at], 0.0f);
      whole[at] = split.values[static_cast<size_t>(i)];
    }
  }
  for (int64_t row = 0; row < s.rows; ++row)
    ASSERT_EQ(std::memcmp(whole.data() + row * s.cols, s.values.data() + row * s.stride,
                          static_cast<size_t>(s.cols) * sizeof(float)),
              0)
        << "row " << row;
}

TEST(Outliers, RemainderAndSparseAreTheMatrix) {
  for (const std::string& kind : cases::kKinds) {
    for (int64_t cols : {1, 33, 1000, 9001}) {
      SCOPED_TRACE(kind + ", cols " + std::to_string(cols));
      const cases::Sample s = cases::sample(kind, 11, cols, QTR_F32, cols % 3);
      for (bool per_row : {false, true}) {
        const int64_t most = per_row ? cols : 11 * cols;
        for (int64_t count : {int64_t{0}, (most + 19) / 20, most}) {
          const Split expected = cases::on_reference([&] { return run(s, count, per_row); });
          expect_whole(s, expected);
          cases::on_every_target([&] { EXPECT_TRUE(run(s, count, per_row) == expected); });
        }
      }
    }
  }
}

TEST(Outliers, OneLongRow) {
  const cases::Sample s = cases::sample("normal", 1, 65536, QTR_F32);
  cases::on_every_target([&] { expect_whole(s, run(s, 700, false)); });
}

// So large that the remainder passes the cache by, with and without gaps between rows; and with so many equal
// numbers that the one way to select them fails halfway.
TEST(Outliers, OfALargeMatrix) {
  for (const char* kind : {"tails", "ties"})
    for (int64_t padding : {0, 1}) {
      const cases::Sample s = cases::sample(kind, 2050, 4099, QTR_F32, padding);
      const Split expected = cases::on_reference([&] { return run(s, 40000, false); });
      expect_whole(s, expected);
      cases::on_every_target([&] { EXPECT_TRUE(run(s, 40000, false) == expected); });
    }
}

TEST(Outliers, CopiesPastTheCacheFromAndToEveryPlace) {
  std::vector<char> in(700), out(700);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<char>(i * 7 + i / 256);
  cases::on_every_target([&] {
    for (size_t to = 0; to < 66; ++to)
      for (size_t bytes : {0, 1, 15, 63, 64, 65, 200, 500}) {
        const size_t from = to * 5 % 66;
        std::fill(out.begin(), out.end(), char{99});
        kernels().copy_past_cache(in.data() + from, out.data() + to, static_cast<int64_t>(bytes), in.data());
        std::vector<char> expected(out.size(), char{99});
        std::copy_n(in.begin() + static_cast<int64_t>(from), bytes,
                    expected.begin() + static_cast<int64_t>(to));
        ASSERT_EQ(out, expected) << to << ", " << bytes;
      }
  });
}

TEST(Outliers, AreTheLargest) {
  cases::Sample s = cases::sample("normal", 3, 50, QTR_F32);
  s.values[20] = 100, s.values[120] = -200, s.values[149] = 150;
  const Split split = run(s, 3, false);
  EXPECT_EQ(split.values, (std::vector<float>{100, -200, 150}));
  EXPECT_EQ(split.columns, (std::vector<uint16_t>{20, 20, 49}));
  EXPECT_EQ(split.row_offsets, (std::vector<int32_t>{0, 1, 1, 3}));
  EXPECT_EQ(split.remainder[20], 0.0f);
}

TEST(Outliers, AtGivenPlaces) {
  const cases::Sample s = cases::sample("normal", 3, 50, QTR_F32, 2);
  const std::vector<int64_t> indices = {0, 49, 50, 149};
  const Split split = run(s, 4, false, indices.data());
  EXPECT_EQ(split.values, (std::vector<float>{s.at(0, 0), s.at(0, 49), s.at(1, 0), s.at(2, 49)}));
  EXPECT_EQ(split.row_offsets, (std::vector<int32_t>{0, 2, 3, 4}));
  expect_whole(s, split);
}

TEST(Outliers, TheRemainderMayBeTheMatrix) {
  const cases::Sample s = cases::sample("tails", 9, 3000, QTR_F32, 4);
  const Split expected = run(s, 500, false);
  cases::Sample in_place = s;
  Split got = expected;
  extract_outliers({sizeof(OutliersArgs), in_place.view(), 500, 0, nullptr,
                    MutableMatrix{in_place.values.data(), 9, 3000, s.stride, QTR_F32}, got.values.data(),
                    got.columns.data(), got.row_offsets.data()});
  for (int64_t row = 0; row < 9; ++row)
    EXPECT_EQ(
        std::memcmp(in_place.values.data() + row * s.stride, expected.remainder.data() + row * 3000, 12000),
        0);
  EXPECT_EQ(got.values, expected.values);
}

TEST(Outliers, WideMatricesHaveWideColumns) {
  const cases::Sample s = cases::sample("zero", 2, 65537, QTR_F32);
  std::vector<float> remainder(2 * 65537), values(1);
  std::vector<int32_t> columns(1), row_offsets(3);
  const int64_t last = 2 * 65537 - 1;
  extract_outliers({sizeof(OutliersArgs), s.view(), 1, 0, &last,
                    MutableMatrix{remainder.data(), 2, 65537, 65537, QTR_F32}, values.data(), columns.data(),
                    row_offsets.data()});
  EXPECT_EQ(columns[0], 65536);
  EXPECT_EQ(row_offsets, (std::vector<int32_t>{0, 0, 1}));
  check_csr({values.data(), columns.data(), row_offsets.data(), 2, 65537, 1, QTR_F32});
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

TEST(Outliers, RefusesWhatBreaksTheContract) {
  const float w[6] = {};
  float remainder[6], values[6];
  uint16_t columns[6];
  int32_t row_offsets[3];
  const OutliersArgs good{sizeof(OutliersArgs),
                          Matrix{w, 2, 2, 2, QTR_F32},
                          1,
                          0,
                          nullptr,
                          MutableMatrix{remainder, 2, 2, 2, QTR_F32},
                          values,
                          columns,
                          row_offsets};
  extract_outliers(good);
  const auto refuses = [&](auto&& change, const char* message) {
    OutliersArgs bad = good;
    change(bad);
    refused([&] { extract_outliers(bad); }, message);
  };
  refuses([](OutliersArgs& a) { a.count = 5; }, "count must not exceed the number of elements: got count=5");
  refuses([](OutliersArgs& a) { a.count = -1; }, "count must be at least 0: got count=-1");
  refuses([](OutliersArgs& a) { a.count = 3, a.per_row = 1; }, "count must not exceed the length of a row");
  refuses([](OutliersArgs& a) { a.remainder.dtype = QTR_F16; },
          "remainder must have the shape and dtype of w");
  refuses([](OutliersArgs& a) { a.remainder.cols = 1; }, "remainder must have the shape and dtype of w");
  refuses([&](OutliersArgs& a) { a.remainder.data = const_cast<float*>(w), a.remainder.row_stride = 3; },
          "remainder must be w or apart from it: got row_stride=3");
  refuses([](OutliersArgs& a) { a.values = nullptr; }, "[extract_outliers] values must not be null");
  refuses([](OutliersArgs& a) { a.w.rows = 0; }, "w must not be empty");
  refuses(
      [](OutliersArgs& a) {
        a.w.cols = a.w.row_stride = a.remainder.cols = a.remainder.row_stride = 1LL << 31;
      },
      "w must have fewer than 2^31 columns");
  const float nan[4] = {0, 0, 0, std::numeric_limits<float>::quiet_NaN()};
  refuses([&](OutliersArgs& a) { a.w.data = nan; },
          "[extract_outliers] w must have no NaN: got row=1, column=1");
  const int64_t outside[1] = {4}, twice[2] = {1, 1};
  refuses([&](OutliersArgs& a) { a.indices = outside; }, "indices must be within w: got index=4");
  refuses([&](OutliersArgs& a) { a.indices = twice, a.count = 2; }, "indices must ascend, each given once");
  refuses([&](OutliersArgs& a) { a.indices = outside, a.per_row = 1; }, "indices are of the whole matrix");
}

TEST(Csr, RefusesWhatIsNotOne) {
  const float values[3] = {1, 2, 3};
  const uint16_t columns[3] = {0, 4, 2}, equal[3] = {4, 4, 2};
  const int32_t offsets[3] = {0, 2, 3}, late[3] = {1, 2, 3}, short_of[3] = {0, 2, 2},
                falling[4] = {0, 3, 2, 3};
  check_csr({values, columns, offsets, 2, 5, 3, QTR_F32});
  refused([&] { check_csr({values, columns, offsets, 2, 4, 3, QTR_F32}); },
          "columns must be within the shape");
  refused([&] { check_csr({values, equal, offsets, 2, 5, 3, QTR_F32}); }, "columns of a row must ascend");
  refused([&] { check_csr({values, columns, late, 2, 5, 3, QTR_F32}); }, "row_offsets must begin with 0");
  refused([&] { check_csr({values, columns, short_of, 2, 5, 3, QTR_F32}); }, "row_offsets must end with");
  const uint16_t rising[3] = {0, 1, 2};
  refused([&] { check_csr({values, rising, falling, 3, 5, 3, QTR_F32}); },
          "row_offsets must not fall: got row=1");
  refused([&] { check_csr({values, columns, offsets, 0, 5, 3, QTR_F32}); }, "shape must not be empty");
  refused([&] { check_csr({values, columns, offsets, 2, 5, -1, QTR_F32}); }, "nnz must be at least 0");
  refused([&] { check_csr({values, nullptr, offsets, 2, 5, 3, QTR_F32}); }, "must not be null");
}

}  // namespace
}  // namespace quantrature
