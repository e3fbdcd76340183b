#include <algorithm>
#include <cmath>
#include <cstring>

#include "cases.hpp"

namespace quantrature {
namespace {

struct Settings {
  int bits;
  int64_t group_size;
  bool per_row;
};

struct Result {
  std::vector<uint8_t> packed, codes;
  std::vector<float> scale, values;

  // By bits, as a zero may have a sign.
  bool same(const Result& other) const {
    const auto equal = [](const std::vector<float>& a, const std::vector<float>& b) {
      return a.size() == b.size() &&
             (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
    };
    return packed == other.packed && equal(scale, other.scale) && equal(values, other.values);
  }
};

struct Positions {
  std::vector<int64_t> offsets;
  std::vector<int32_t> columns;
};

int64_t groups_in(int64_t cols, int64_t group_size) {
  if (group_size <= 0) return -group_size;
  return (cols + group_size - 1) / group_size;
}

Result run(const Matrix& w, const Settings& s, const Matrix& table, const Positions* excluded = nullptr) {
  const int64_t groups = w.rows * groups_in(w.cols, s.group_size);
  Result r;
  r.packed.resize(static_cast<size_t>(w.rows * row_bytes(w.cols, s.bits)));
  r.codes.resize(static_cast<size_t>(w.rows * w.cols));
  r.scale.resize(static_cast<size_t>(groups));
  r.values.resize(r.codes.size());
  CodebookQuantizeArgs args{};
  args.struct_size = sizeof(args);
  args.w = w;
  args.bits = s.bits;
  args.group_size = s.group_size;
  args.table = table;
  if (excluded)
    args.exclude_row_offsets = excluded->offsets.data(), args.exclude_columns = excluded->columns.data();
  args.codes = r.packed.data();
  args.codes_size = static_cast<int64_t>(r.packed.size());
  args.scale = groups ? r.scale.data() : nullptr;
  args.groups = groups;
  codebook_quantize(args);
  codebook_dequantize({sizeof(CodebookDequantizeArgs), r.packed.data(), args.codes_size, s.bits, s.group_size,
                       table, groups ? Matrix{r.scale.data(), 1, groups, groups, QTR_F32} : Matrix{},
                       MutableMatrix{r.values.data(), w.rows, w.cols, w.cols, QTR_F32}});
  unpack({sizeof(UnpackArgs), r.packed.data(), w.rows, row_bytes(w.cols, s.bits), s.bits, r.codes.data(),
          w.cols, w.cols});
  return r;
}

cases::Sample table_for(const Settings& s, int64_t rows, DType dtype, bool ascending) {
  cases::Sample t = cases::sample("normal", s.per_row ? rows : 1, int64_t{1} << s.bits, dtype, 0, 3);
  if (!ascending) return t;
  for (int64_t row = 0; row < t.rows; ++row) {
    std::sort(t.values.begin() + row * t.cols, t.values.begin() + (row + 1) * t.cols);
    for (int64_t i = row * t.cols; dtype != QTR_F32 && i < (row + 1) * t.cols; ++i)
      t.bits[static_cast<size_t>(i)] = dtype == QTR_F16 ? f16_from_f32(t.values[static_cast<size_t>(i)])
                                                        : bf16_from_f32(t.values[static_cast<size_t>(i)]);
  }
  return t;
}

// The sign of 2 x - a - b is exact: rounding the sum of the two largest loses no sign, nor does that of all.
bool beyond_the_middle(float x, float a, float b) {
  double parts[] = {2 * static_cast<double>(x), -static_cast<double>(a), -static_cast<double>(b)};
  std::sort(parts, parts + 3, [](double p, double q) { return std::abs(p) > std::abs(q); });
  return parts[0] + parts[1] + parts[2] > 0;
}

// Nearest by comparing pairs: of equally near entries the lower, of equal ones the first.
int nearest(float at, const float* entries, int count) {
  int best = 0;
  for (int i = 1; i < count; ++i) {
    const bool beyond = beyond_the_middle(at, entries[i], entries[best]);
    if (entries[i] > entries[best] ? beyond : entries[i] < entries[best] && !beyond) best = i;
  }
  return best;
}

void expect_definition(const cases::Sample& w, const Settings& s, const cases::Sample& table,
                       const Result& r) {
  const int count = 1 << s.bits;
  const int64_t groups = groups_in(w.cols, s.group_size), size = s.group_size > 0 ? s.group_size : w.cols;
  for (int64_t row = 0; row < w.rows; ++row)
    for (int64_t col = 0; col < w.cols; ++col) {
      float inv = 1, scale = 1;
      if (groups > 0) {
        scale = 0;
        for (int64_t i = col / size * size; i < std::min(w.cols, (col / size + 1) * size); ++i)
          scale = std::max(scale, std::abs(w.at(row, i)));
        if (scale < 0x1p-100f) scale = 0;
        inv = scale == 0 ? 0 : 1 / scale;
        ASSERT_EQ(r.scale[static_cast<size_t>(row * groups + col / size)], scale);
      }
      const float* entries = table.values.data() + (s.per_row ? row * table.stride : 0);
      const int code = nearest(w.at(row, col) * inv, entries, count);
      const auto i = static_cast<size_t>(row * w.cols + col);
      ASSERT_EQ(int{r.codes[i]}, code) << "row " << row << ", col " << col;
      ASSERT_EQ(r.values[i], entries[code] * scale);
    }
}

TEST(Codebook, EveryTargetFindsTheNearestEntry) {
  for (const std::string& kind : cases::kKinds)
    for (DType dtype : cases::kDTypes)
      for (int64_t cols : {1, 3, 16, 63, 64, 257, 1000}) {
        const int bits = 1 + static_cast<int>(cols % 8);
        cases::Sample w = cases::sample(kind, 3, cols, dtype, cols % 3);
        for (size_t i = 0; i < w.bits.size(); ++i)  // heavy tails leave the range of float16
          if (!std::isfinite(w.values[i])) w.values[i] = 1, w.bits[i] = f16_from_f32(1);
        for (const Settings& s : {Settings{bits, 64, false},
                                  {bits, 17, true},
                                  {bits, -1, false},
                                  {bits, 0, true},
                                  {bits, 0, false}})
          for (bool ascending : {true, false}) {
            SCOPED_TRACE(kind + ", cols " + std::to_string(cols) + ", dtype " + std::to_string(dtype) +
                         ", bits " + std::to_string(bits) + ", group " + std::to_string(s.group_size));
            const cases::Sample table = table_for(s, 3, dtype, ascending);
            const Result expected = cases::on_reference([&] { return run(w.view(), s, table.view()); });
            expect_definition(w, s, table, expected);
            cases::on_every_target([&] { EXPECT_TRUE(run(w.view(), s, table.view()).same(expected)); });
          }
      }
}

TEST(Codebook, EveryNumberOfBits) {
  const cases::Sample w = cases::sample("normal", 4, 333, QTR_F32);
  for (int bits = 1; bits <= 8; ++bits)
    for (const Settings& s : {Settings{bits, 32, false}, Settings{bits, 0, true}}) {
      SCOPED_TRACE("bits " + std::to_string(bits));
      const cases::Sample table = table_for(s, 4, QTR_F32, true);
      const Result expected = cases::on_reference([&] { return run(w.view(), s, table.view()); });
      expect_definition(w, s, table, expected);
      cases::on_every_target([&] { EXPECT_TRUE(run(w.view(), s, table.view()).same(expected)); });
    }
}

// Numbers at the middle between two entries and beside it, where the middle is a float and where it is not.
TEST(Codebook, TiesGoToTheLowerEntry) {
  cases::Sample table = cases::sample("normal", 1, 4, QTR_F32);
  for (const std::vector<float>& entries : {std::vector<float>{-1, 0, 0.5f, 1},
                                            {1, 0.5f, 0, -1},
                                            {1, std::nextafter(1.0f, 2.0f), 1e-30f, 3e30f},
                                            {-1, 1, 1, -1},
                                            {0x1p-149f, 0, -0.0f, 1},
                                            {-0x1.000002p-20f, 1, 0x1.000002p30f, 5}}) {
    table.values = entries;
    cases::Sample w = cases::sample("normal", 1, 64, QTR_F32);
    size_t at = 0;
    for (size_t i = 0; i < 4; ++i)
      for (size_t j = 0; j < i; ++j) {
        const float middle = entries[i] / 2 + entries[j] / 2;
        for (float x : {middle, std::nextafter(middle, 4e30f), std::nextafter(middle, -4e30f), entries[i]})
          w.values[at++] = x;
      }
    cases::on_every_target(
        [&] { expect_definition(w, {2, 0, false}, table, run(w.view(), {2, 0, false}, table.view())); });
  }
}

TEST(Codebook, ExcludedPositionsDoNotScale) {
  cases::Sample w = cases::sample("normal", 2, 8, QTR_F32);
  w.values = {1, -100, 0.5f, 0.25f, 7, -9, 8, 9, 2, 1, 1, 1, 1, 1, 1, -4};
  cases::Sample table = cases::sample("normal", 1, 4, QTR_F32);
  table.values = {-1, -0.25f, 0.25f, 1};
  const Positions excluded{{0, 5, 6}, {1, 4, 5, 6, 7, 0}};
  cases::on_every_target([&] {
    const Result r = run(w.view(), {2, 4, false}, table.view(), &excluded);
    EXPECT_EQ(r.scale, (std::vector<float>{1, 0, 1, 4}));
    EXPECT_EQ(r.codes, (std::vector<uint8_t>{3, 0, 2, 2, 1, 1, 1, 1, 3, 3, 3, 3, 2, 2, 2, 0}));
  });
}

TEST(Codebook, RefusesWhatBreaksTheContract) {
  const cases::Sample w = cases::sample("normal", 3, 40, QTR_F32),
                      table = cases::sample("normal", 1, 8, QTR_F32);
  std::vector<uint8_t> codes(static_cast<size_t>(3 * row_bytes(40, 3)));
  std::vector<float> scale(9), values(120);
  const std::vector<int64_t> offsets{0, 1, 1, 1};
  const std::vector<int32_t> columns{40};
  CodebookQuantizeArgs good{};
  good.struct_size = sizeof(good);
  good.w = w.view();
  good.bits = 3;
  good.group_size = 16;
  good.table = table.view();
  good.codes = codes.data();
  good.codes_size = static_cast<int64_t>(codes.size());
  good.scale = scale.data();
  good.groups = 9;
  codebook_quantize(good);
  const CodebookDequantizeArgs good_back{sizeof(CodebookDequantizeArgs),
                                         codes.data(),
                                         good.codes_size,
                                         3,
                                         16,
                                         table.view(),
                                         Matrix{scale.data(), 3, 3, 3, QTR_F32},
                                         MutableMatrix{values.data(), 3, 40, 40, QTR_F32}};
  codebook_dequantize(good_back);
  const auto refuses = [](auto op, auto args, auto&& change, const char* message) {
    change(args);
    try {
      op(args);
      ADD_FAILURE() << "accepted, expected: " << message;
    } catch (const InvalidArgument& e) {
      EXPECT_NE(std::string(e.what()).find(message), std::string::npos) << e.what();
    }
  };
  const auto quantizing = [&](auto&& change, const char* message) {
    refuses(codebook_quantize, good, change, message);
  };
  quantizing([](auto& a) { a.w.rows = 0; }, "[codebook] w must not be empty");
  quantizing([](auto& a) { a.bits = 9; }, "[codebook] bits must be 1 to 8: got bits=9");
  quantizing([](auto& a) { a.bits = 4; }, "[codebook] table must have 2^bits entries: got entries=8, bits=4");
  quantizing([](auto& a) { a.table.rows = 2; },
             "[codebook] table must have one row, or one for each row: got rows=2, expected=3");
  quantizing([](auto& a) { a.group_size = -2; }, "[codebook] group_size must be -1, 0 or at least 1");
  quantizing([](auto& a) { a.codes_size = 1; }, "[codebook] codes must hold all packed rows");
  quantizing([](auto& a) { a.groups = 8; }, "[codebook] scale must hold one number for each group");
  quantizing([](auto& a) { a.group_size = 0; }, "[codebook] scale must hold one number for each group");
  quantizing([](auto& a) { a.scale = nullptr; }, "[codebook] scale must hold one number for each group");
  quantizing([&](auto& a) { a.exclude_row_offsets = offsets.data(); },
             "[codebook] exclude_columns must not be null");
  quantizing([&](auto& a) { a.exclude_row_offsets = offsets.data(), a.exclude_columns = columns.data(); },
             "[codebook] exclude must lie within w: got row=0, col=40");
  cases::Sample odd = w, odd_table = table;
  odd.values[50] = std::numeric_limits<float>::quiet_NaN();
  odd_table.values[5] = std::numeric_limits<float>::infinity();
  quantizing([&](auto& a) { a.w = odd.view(); }, "[codebook] w must be finite: got value=nan, row=1, col=10");
  quantizing([&](auto& a) { a.table = odd_table.view(); },
             "[codebook] table must be finite: got value=inf, row=0, entry=5");
  const auto going_back = [&](auto&& change, const char* message) {
    refuses(codebook_dequantize, good_back, change, message);
  };
  going_back([](auto& a) { a.bits = 0; }, "[codebook] bits must be 1 to 8: got bits=0");
  going_back([](auto& a) { a.codes_size = 1; }, "[codebook] codes must hold all packed rows");
  going_back([](auto& a) { a.scale.cols = 2; }, "[codebook] scale must hold one number for each group");
  going_back([](auto& a) { a.scale = {}; }, "[codebook] scale must be there if and only if there are groups");
  going_back([](auto& a) { a.group_size = 0; },
             "[codebook] scale must be there if and only if there are groups");
}

}  // namespace
}  // namespace quantrature
