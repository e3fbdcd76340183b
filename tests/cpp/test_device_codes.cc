// Codebooks, Hadamard transforms and trellis codes on a device against the same on the CPU; see
// test_device.cc.
#include <cmath>
#include <numeric>

#include "device_fixture.hpp"

namespace quantrature {
namespace {

TEST_F(OnDevice, Codebooks) {
  std::vector<float> entries(4 * 16);
  for (size_t i = 0; i < entries.size(); ++i)
    entries[i] = std::round(10 * std::sin(static_cast<float>(7 * i))) / 8;  // in no order, some alike
  const std::vector<int64_t> offsets = {0, 2, 2, 3, 4};
  const std::vector<int32_t> columns = {3, 40, 0, 99};
  const DeviceArray<float> d_entries(entries);
  const DeviceArray<int64_t> d_offsets(offsets);
  const DeviceArray<int32_t> d_columns(columns);
  for (const int64_t cols : {100, 512, 2300})
    for (const int64_t group : {int64_t{-1}, int64_t{0}, int64_t{64}})
      for (const bool excludes : {false, true})
        for (const int64_t tables : {1, 4}) {
          const DType dtype = tables == 1 ? QTR_BF16 : QTR_F32;
          const cases::Sample s = cases::sample("normal", 4, cols, dtype);
          const Input x(s);
          CodebookQuantizeArgs args{};
          args.struct_size = sizeof(args);
          args.w = s.view();
          args.bits = 4;
          args.group_size = group;
          args.table = {entries.data(), tables, 16, 16, QTR_F32};
          if (excludes) args.exclude_row_offsets = offsets.data(), args.exclude_columns = columns.data();
          args.groups =
              group == 0 ? 0 : 4 * ((cols + (group < 0 ? cols : group) - 1) / (group < 0 ? cols : group));
          std::vector<uint8_t> codes(static_cast<size_t>(4 * row_bytes(cols, 4)));
          std::vector<float> scale(static_cast<size_t>(args.groups));
          args.codes = codes.data();
          args.codes_size = static_cast<int64_t>(codes.size());
          args.scale = group == 0 ? nullptr : scale.data();
          codebook_quantize(args);
          const DeviceArray<uint8_t> d_codes(codes.size());
          const DeviceArray<float> d_scale(scale.size());
          args.w = x.m;
          args.table.data = d_entries.data();
          if (excludes) args.exclude_row_offsets = d_offsets.data(), args.exclude_columns = d_columns.data();
          args.codes = d_codes.data();
          args.scale = group == 0 ? nullptr : d_scale.data();
          args.device = kDevice;
          codebook_quantize(args);
          expect_same(d_codes.read(), codes);
          if (group != 0) expect_same(d_scale.read(), scale);

          std::vector<float> dense(static_cast<size_t>(4 * cols));
          const DeviceArray<float> d_dense(dense.size());
          CodebookDequantizeArgs back{};
          back.struct_size = sizeof(back);
          back.codes = codes.data();
          back.codes_size = args.codes_size;
          back.bits = 4;
          back.group_size = group;
          back.table = {entries.data(), tables, 16, 16, QTR_F32};
          if (group != 0) back.scale = {scale.data(), 1, args.groups, args.groups, QTR_F32};
          back.out = {dense.data(), 4, cols, cols, QTR_F32};
          codebook_dequantize(back);
          back.codes = d_codes.data();
          back.table.data = d_entries.data();
          if (group != 0) back.scale.data = d_scale.data();
          back.out.data = d_dense.data();
          back.device = kDevice;
          codebook_dequantize(back);
          expect_same(d_dense.read(), dense);
        }
}

// Products with codes of a codebook, one weight in nine kept beside them.
TEST_F(OnDevice, MatvecOfCodebooks) {
  struct Case {
    int64_t rows, cols;
    int bits;
    int64_t group;
    bool table_per_row;
    DType dtype;
  };
  std::vector<Case> all;
  for (int bits : {2, 3, 4, 8})
    for (int64_t group : {0, -1, 32, 64}) all.push_back({6, 1152, bits, group, group != 64, QTR_F32});
  for (int bits : {1, 5}) all.push_back({5, 256, bits, 64, true, QTR_F32});
  all.push_back({5, 33, 4, -1, false, QTR_F32});
  all.push_back({3, 768, 4, 48, false, QTR_F16});
  all.push_back({9, 768, 3, 0, true, QTR_F16});
  all.push_back({9, 768, 4, 96, false, QTR_BF16});
  std::mt19937 generator(1);
  for (const Case& c : all) {
    SCOPED_TRACE(std::to_string(c.cols) + " columns, bits " + std::to_string(c.bits) + ", group " +
                 std::to_string(c.group));
    const int64_t per_row = c.group < 1 ? 1 : (c.cols + c.group - 1) / c.group;
    const cases::Sample table =
        cases::sample("normal", c.table_per_row ? c.rows : 1, int64_t{1} << c.bits, c.dtype, 5);
    const cases::Sample scale = cases::sample("normal", c.rows, per_row, c.dtype);
    std::vector<uint8_t> codes(static_cast<size_t>(c.rows * row_bytes(c.cols, c.bits)));
    for (uint8_t& byte : codes) byte = static_cast<uint8_t>(generator());
    std::vector<uint16_t> columns;
    std::vector<float> values;
    std::vector<int32_t> offsets{0};
    for (int64_t row = 0; row < c.rows; ++row) {
      for (int64_t col = row; col < c.cols; col += 9) {
        columns.push_back(static_cast<uint16_t>(col));
        values.push_back(static_cast<float>(row) - 0.3f * static_cast<float>(col % 11));
      }
      offsets.push_back(static_cast<int32_t>(columns.size()));
    }
    const Input d_table(table), d_scale(scale);
    const DeviceArray<uint8_t> d_codes(codes);
    const DeviceArray<float> d_values(values), d_residual(values.size());
    const DeviceArray<uint16_t> d_columns(columns);
    const DeviceArray<int32_t> d_offsets(offsets);
    const auto matrix = [&](const uint8_t* of, const Matrix& scales) {
      return GridMatrix{of,      static_cast<int64_t>(codes.size()), c.rows, c.cols, c.bits,
                        c.group, c.group == 0 ? Matrix{} : scales,   {}};
    };
    const auto csr = [&](const float* v, const uint16_t* at, const int32_t* o) {
      return Csr{v, at, o, c.rows, c.cols, static_cast<int64_t>(values.size()), QTR_F32};
    };
    std::vector<float> residual(values.size()), dense(static_cast<size_t>(c.rows * c.cols));
    residuals({sizeof(ResidualsArgs),
               matrix(codes.data(), scale.view()),
               csr(values.data(), columns.data(), offsets.data()),
               residual.data(),
               {},
               table.view()});
    residuals({sizeof(ResidualsArgs), matrix(d_codes.data(), d_scale.m),
               csr(d_values.data(), d_columns.data(), d_offsets.data()), d_residual.data(), kDevice,
               d_table.m});
    expect_same(d_residual.read(), residual);
    codebook_dequantize({sizeof(CodebookDequantizeArgs), codes.data(), static_cast<int64_t>(codes.size()),
                         c.bits, c.group, table.view(), c.group == 0 ? Matrix{} : scale.view(),
                         MutableMatrix{dense.data(), c.rows, c.cols, c.cols, QTR_F32}});

    for (DType dtype : cases::kDTypes)
      for (int64_t vectors : {1, 3, 7, 9, 16}) {
        if ((dtype == QTR_F32) != (vectors == 7 || vectors == 9) && c.group != 64) continue;
        SCOPED_TRACE(std::to_string(vectors) + " vectors of dtype " + std::to_string(dtype));
        const cases::Sample x = cases::sample("normal", vectors, c.cols, dtype, vectors == 9 ? 3 : 4);
        const Input d_x(x);
        std::vector<float> y(static_cast<size_t>(vectors * c.rows));
        const DeviceArray<float> d_y(y.size());
        matvec({sizeof(MatvecArgs),
                matrix(codes.data(), scale.view()),
                csr(residual.data(), columns.data(), offsets.data()),
                x.view(),
                MutableMatrix{y.data(), vectors, c.rows, c.rows, QTR_F32},
                QTR_ACTIVATIONS_FLOAT32,
                {},
                table.view()});
        matvec({sizeof(MatvecArgs), matrix(d_codes.data(), d_scale.m),
                csr(d_residual.data(), d_columns.data(), d_offsets.data()), d_x.m,
                MutableMatrix{d_y.data(), vectors, c.rows, c.rows, QTR_F32}, QTR_ACTIVATIONS_FLOAT32, kDevice,
                d_table.m});
        const std::vector<float> got = d_y.read();
        for (int64_t v = 0; v < vectors; ++v)
          for (int64_t row = 0; row < c.rows; ++row) {
            double size = 0;
            for (int64_t col = 0; col < c.cols; ++col)
              size += std::abs(dense[static_cast<size_t>(row * c.cols + col)] * x.at(v, col));
            for (int32_t i = offsets[static_cast<size_t>(row)]; i < offsets[static_cast<size_t>(row + 1)];
                 ++i)
              size += std::abs(residual[static_cast<size_t>(i)] * x.at(v, columns[static_cast<size_t>(i)]));
            const auto at = static_cast<size_t>(v * c.rows + row);
            EXPECT_NEAR(got[at], y[at], 2 * std::ldexp(static_cast<double>(c.cols) / 8 + 32, -23) * size);
          }
      }
  }
}

TEST_F(OnDevice, CodebooksRefuseWhatIsNotFinite) {
  cases::Sample s = cases::sample("normal", 3, 64, QTR_F32);
  const std::vector<float> entries = {-1, 0, 1, 2};
  const auto refusal = [&](const std::vector<float>& table) {
    const Input x(s);
    const DeviceArray<float> d_table(table), scale(3);
    const DeviceArray<uint8_t> codes(static_cast<size_t>(3 * row_bytes(64, 2)));
    CodebookQuantizeArgs args{};
    args.struct_size = sizeof(args);
    args.w = x.m;
    args.bits = 2;
    args.group_size = -1;
    args.table = {d_table.data(), 1, 4, 4, QTR_F32};
    args.groups = 3;
    args.codes = codes.data();
    args.codes_size = 3 * row_bytes(64, 2);
    args.scale = scale.data();
    args.device = kDevice;
    try {
      codebook_quantize(args);
    } catch (const InvalidArgument& e) {
      return std::string(e.what());
    }
    return std::string("taken");
  };
  EXPECT_EQ(refusal(entries), "taken");
  EXPECT_EQ(refusal({-1, 0, INFINITY, 2}), "[codebook] table must be finite: got value=inf, row=0, entry=2");
  s.values[2 * 64 + 7] = -INFINITY;
  EXPECT_EQ(refusal(entries), "[codebook] w must be finite: got value=-inf, row=2, col=7");
}

TEST_F(OnDevice, Hadamard) {
  for (const int64_t n : {1, 8, 12, 56, 256, 1536, 16384})
    for (DType dtype : {QTR_F32, QTR_BF16})
      for (const bool inverse : {false, true}) {
        const cases::Sample s = cases::sample("normal", 3, n, dtype, 3);
        const Input x(s);
        std::vector<uint8_t> signs(static_cast<size_t>((n + 7) / 8));
        random_signs({sizeof(RandomSignsArgs), 5, n, signs.data()});
        const DeviceArray<uint8_t> d_signs(signs);
        std::vector<float> host(static_cast<size_t>(3 * n));
        const DeviceArray<float> device(host.size());
        HadamardArgs args{
            sizeof(HadamardArgs), s.view(), signs.data(), inverse, {host.data(), 3, n, n, QTR_F32}, {}};
        hadamard(args);
        args = {
            sizeof(HadamardArgs), x.m, d_signs.data(), inverse, {device.data(), 3, n, n, QTR_F32}, kDevice};
        hadamard(args);
        expect_same(device.read(), host);
      }
}

TEST_F(OnDevice, Trellises) {
  for (auto code : {QTR_1MAD, QTR_3INST, QTR_HYB})
    for (int bits : {1, 2, 3, 4}) {
      if (code == QTR_HYB && bits == 4) continue;
      const Trellis trellis{code, bits, bits % 2 == 0 ? 12 : 16};
      // One row of tiles, and more than a block has at a time; memory that is not aligned.
      const int64_t rows = 48, cols = bits == 3 ? 1104 : 80, shift = bits == 3 ? 1 : 0,
                    tiles = rows / 16 * (cols / 16), bytes = 32 * bits;
      std::vector<uint8_t> codes(static_cast<size_t>(tiles * bytes));
      for (size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<uint8_t>(i * 151 + i / 7);
      std::vector<uint8_t> shifted(static_cast<size_t>(shift));
      shifted.insert(shifted.end(), codes.begin(), codes.end());
      const DeviceArray<uint8_t> d_codes(shifted);
      std::vector<float> dense(static_cast<size_t>(tiles * 256));
      const DeviceArray<float> d_dense(dense.size());
      TrellisDequantizeArgs back{sizeof(back),
                                 codes.data(),
                                 static_cast<int64_t>(codes.size()),
                                 trellis,
                                 0.7f,
                                 {dense.data(), tiles, 256, 256, QTR_F32},
                                 {}};
      trellis_dequantize(back);
      back.codes = d_codes.data() + shift;
      back.out.data = d_dense.data();
      back.device = kDevice;
      trellis_dequantize(back);
      expect_same(d_dense.read(), dense);

      const cases::Sample x = cases::sample("normal", 6, cols, QTR_F16, 3);
      const Input d_x(x);
      std::vector<float> y(static_cast<size_t>(6 * rows));
      const DeviceArray<float> d_y(y.size());
      TrellisMatvecArgs args{
          sizeof(args), codes.data(), static_cast<int64_t>(codes.size()), rows, cols, trellis,
          0.7f,         x.view(),     {y.data(), 6, rows, rows, QTR_F32}, {}};
      trellis_matvec(args);
      args.codes = d_codes.data() + shift;
      args.x = d_x.m;
      args.out.data = d_y.data();
      args.device = kDevice;
      trellis_matvec(args);
      const std::vector<float> got = d_y.read();
      for (int64_t v = 0; v < 6; ++v)
        for (int64_t row = 0; row < rows; ++row) {
          double size = 0;
          for (int64_t col = 0; col < cols; ++col)
            size += std::abs(dense[static_cast<size_t>((row / 16 * (cols / 16) + col / 16) * 256 +
                                                       row % 16 * 16 + col % 16)] *
                             x.at(v, col));
          const auto at = static_cast<size_t>(v * rows + row);
          EXPECT_NEAR(got[at], y[at], 2 * std::ldexp(static_cast<double>(cols) / 4 + 32, -23) * size);
        }
    }
}

TEST_F(OnDevice, TrellisSearch) {
  for (auto code : {QTR_1MAD, QTR_3INST, QTR_HYB})
    for (int bits = 1; bits <= 4; ++bits)
      for (int state_bits : {2, 3, 4, 7, 8, 9, 11, 16}) {
        const int step_bits = code == QTR_HYB ? 2 * bits : bits;
        if (state_bits < step_bits || (state_bits == 16 && (code == QTR_1MAD || bits == 3))) continue;
        for (const char* kind : {"normal", "ties"}) {
          SCOPED_TRACE("code " + std::to_string(code) + ", " + std::to_string(bits) + " bits, state of " +
                       std::to_string(state_bits) + ", " + kind);
          const DType dtype = kind == std::string("ties") ? QTR_BF16 : QTR_F32;
          const int64_t rows = state_bits > 9 ? 1 : 3, cols = state_bits == 16 ? 18 : 46;
          const cases::Sample s =
              cases::sample(kind, rows, cols, dtype, 3, static_cast<uint32_t>(state_bits));
          const Input x(s);
          std::vector<uint8_t> codes(static_cast<size_t>(rows * ((cols * bits + 7) / 8)));
          const DeviceArray<uint8_t> d_codes(codes.size());
          const auto size = static_cast<int64_t>(codes.size());
          const Trellis trellis{code, bits, state_bits};
          trellis_quantize({sizeof(TrellisQuantizeArgs), s.view(), trellis, 0.9f, codes.data(), size});
          trellis_quantize({sizeof(TrellisQuantizeArgs), x.m, trellis, 0.9f, d_codes.data(), size, kDevice});
          expect_same(d_codes.read(), codes);
        }
      }
}

// The places that costs and values have where the shared memory of a block is smaller; in three orders of the
// blocks, some of which are in flight together.
TEST_F(OnDevice, TrellisSearchWithLittleSharedMemory) {
  const cases::Sample s = cases::sample("normal", 7, 40, QTR_F32);
  const Input x(s);
  std::vector<uint8_t> codes(static_cast<size_t>(7 * 10));
  const Trellis trellis{QTR_3INST, 2, 10};
  trellis_quantize({sizeof(TrellisQuantizeArgs), s.view(), trellis, 1, codes.data(), 70});
  for (const char* bytes : {"1536", "3072", "8192"})
    for (int order = 0; order < 3; ++order) {
      setenv("CUDA_ON_HOST_SHARED_BYTES", bytes, 1);
      const DeviceArray<uint8_t> d_codes(codes.size());
      trellis_quantize({sizeof(TrellisQuantizeArgs), x.m, trellis, 1, d_codes.data(), 70, kDevice});
      unsetenv("CUDA_ON_HOST_SHARED_BYTES");
      expect_same(d_codes.read(), codes);
    }
}

// Distances and costs beyond what 16 bits hold, and more sequences than are searched at a time.
TEST_F(OnDevice, TrellisSearchFarAway) {
  for (const Trellis& trellis :
       std::vector<Trellis>{{QTR_HYB, 2, 6}, {QTR_3INST, 2, 3}, {QTR_3INST, 1, 8}, {QTR_1MAD, 3, 11}})
    for (const char* kind : {"tails", "zero", "offset"}) {
      const cases::Sample s = cases::sample(kind, 40, 24, QTR_F32);
      const Input x(s);
      const int64_t size = 40 * 3 * trellis.bits;
      std::vector<uint8_t> codes(static_cast<size_t>(size));
      const DeviceArray<uint8_t> d_codes(codes.size());
      trellis_quantize({sizeof(TrellisQuantizeArgs), s.view(), trellis, 0.02f, codes.data(), size});
      trellis_quantize({sizeof(TrellisQuantizeArgs), x.m, trellis, 0.02f, d_codes.data(), size, kDevice});
      expect_same(d_codes.read(), codes);
    }
}

// A thread has four overlaps; where there are fewer, the costs of those that are not must not count. They are
// the least where x is 0 and no value is, which shows when costs reach what 16 bits hold.
TEST_F(OnDevice, TrellisSearchWithFewOverlaps) {
  std::mt19937 random(1);
  for (const Trellis& trellis :
       std::vector<Trellis>{{QTR_HYB, 2, 5}, {QTR_HYB, 4, 9}, {QTR_3INST, 2, 3}, {QTR_1MAD, 4, 5}}) {
    constexpr int64_t kRows = 300, kCols = 24;
    cases::Sample s = cases::sample("normal", kRows, kCols, QTR_F32);
    for (float& value : s.values) {
      const double size = std::exp(static_cast<double>(random() % 1000) / 150);
      value = random() % 3 == 0 ? 0.0f : value * static_cast<float>(size);
    }
    const Input x(s);
    const int64_t size = kRows * kCols * trellis.bits / 8;
    std::vector<uint8_t> codes(static_cast<size_t>(size));
    const DeviceArray<uint8_t> d_codes(codes.size());
    trellis_quantize({sizeof(TrellisQuantizeArgs), s.view(), trellis, 0.2f, codes.data(), size});
    trellis_quantize({sizeof(TrellisQuantizeArgs), x.m, trellis, 0.2f, d_codes.data(), size, kDevice});
    SCOPED_TRACE(trellis.code);
    expect_same(d_codes.read(), codes);
  }
}

TEST_F(OnDevice, TrellisSearchRefusesWhatIsNotFinite) {
  cases::Sample s = cases::sample("normal", 3, 32, QTR_F32);
  s.values[40] = std::numeric_limits<float>::infinity();
  const Input x(s);
  const DeviceArray<uint8_t> codes(size_t{24});
  EXPECT_THROW(
      trellis_quantize({sizeof(TrellisQuantizeArgs), x.m, {QTR_3INST, 2, 8}, 1, codes.data(), 24, kDevice}),
      InvalidArgument);
}

TEST_F(OnDevice, Kmeans) {
  for (const auto& [rows, cols] :
       std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {3, 9}, {2, 130}, {2, 700}})
    for (const char* kind : {"normal", "ties", "outlier", "constant", "zero", "tails"})
      for (int k : {1, 2, 5, 16, 256}) {
        for (int weighted : {0, 1, 2}) {
          if (cols == 700 && (k != 16 || weighted == 2 || std::strlen(kind) != 6)) continue;
          if (cols == 130 ? k < 5 || weighted == 0 : k == 256) continue;
          SCOPED_TRACE(std::string(kind) + ", " + std::to_string(cols) + " columns, k " + std::to_string(k) +
                       ", weights " + std::to_string(weighted));
          const DType dtype = kind == std::string("ties") ? QTR_F16 : QTR_F32;
          const cases::Sample s = cases::sample(kind, rows, cols, dtype, 3);
          cases::Sample w = cases::sample("tails", rows, cols, QTR_F32, 1, 5);
          for (size_t i = 0; i < w.values.size(); ++i)
            w.values[i] =
                (weighted == 2 && i % 3 > 0) || i < static_cast<size_t>(w.stride) ? 0 : std::abs(w.values[i]);
          const Input x(s), d_w(w);
          std::vector<float> centroids(static_cast<size_t>(rows * (k + 2)), 7);
          std::vector<uint8_t> assignment(static_cast<size_t>(rows * cols));
          const DeviceArray<float> d_centroids(centroids);
          const DeviceArray<uint8_t> d_assignment(assignment.size());
          kmeans({sizeof(KmeansArgs), s.view(), weighted > 0 ? w.view() : Matrix{}, k,
                  MutableMatrix{centroids.data(), rows, k, k + 2, QTR_F32}, assignment.data()});
          kmeans({sizeof(KmeansArgs), x.m, weighted > 0 ? d_w.m : Matrix{}, k,
                  MutableMatrix{d_centroids.data(), rows, k, k + 2, QTR_F32}, d_assignment.data(), kDevice});
          expect_same(d_centroids.read(), centroids);
          expect_same(d_assignment.read(), assignment);
        }
      }
}

TEST_F(OnDevice, KmeansTakesTheLowestOfEquallyGoodPlaces) {
  for (int64_t cols : {9, 16, 40, 65})
    for (int k : {2, 3, 4, 7}) {
      SCOPED_TRACE(std::to_string(cols) + " columns, k " + std::to_string(k));
      cases::Sample s = cases::sample("normal", 1, cols, QTR_F32);
      std::iota(s.values.begin(), s.values.end(), 0.0f);
      const Input x(s);
      std::vector<float> centroids(static_cast<size_t>(k));
      std::vector<uint8_t> assignment(static_cast<size_t>(cols));
      const DeviceArray<float> d_centroids(centroids.size());
      const DeviceArray<uint8_t> d_assignment(assignment.size());
      kmeans({sizeof(KmeansArgs),
              s.view(),
              {},
              k,
              MutableMatrix{centroids.data(), 1, k, k, QTR_F32},
              assignment.data()});
      kmeans({sizeof(KmeansArgs),
              x.m,
              {},
              k,
              MutableMatrix{d_centroids.data(), 1, k, k, QTR_F32},
              d_assignment.data(),
              kDevice});
      expect_same(d_centroids.read(), centroids);
      expect_same(d_assignment.read(), assignment);
    }
}

TEST_F(OnDevice, KmeansRefusesAsTheCpuDoes) {
  const auto message = [](const KmeansArgs& args) {
    try {
      kmeans(args);
    } catch (const InvalidArgument& e) {
      return std::string(e.what());
    }
    return std::string("taken");
  };
  cases::Sample s = cases::sample("normal", 3, 20, QTR_F32), w = cases::sample("constant", 3, 20, QTR_F32);
  std::vector<float> centroids(12);
  std::vector<uint8_t> assignment(60);
  const DeviceArray<float> d_centroids(centroids.size());
  const DeviceArray<uint8_t> d_assignment(assignment.size());
  for (const auto& [bad_x, bad_w] : std::vector<std::pair<size_t, size_t>>{{25, 24}, {45, 24}, {25, 40}}) {
    s.values[bad_x] = std::numeric_limits<float>::infinity();
    w.values[bad_w] = -2;
    const Input x(s), d_w(w);
    const std::string host = message({sizeof(KmeansArgs), s.view(), w.view(), 4,
                                      MutableMatrix{centroids.data(), 3, 4, 4, QTR_F32}, assignment.data()});
    EXPECT_NE(host, "taken");
    EXPECT_EQ(message({sizeof(KmeansArgs), x.m, d_w.m, 4, MutableMatrix{d_centroids.data(), 3, 4, 4, QTR_F32},
                       d_assignment.data(), kDevice}),
              host);
    s.values[bad_x] = w.values[bad_w] = 1;
  }
}

struct GptqCase {
  int64_t rows, cols, group;
  DType dtype;
  int bits;
  bool ordered, excludes, fitted, mse, sym, half;
  double damp = 0.01;
};

// Everything that gptq writes.
struct GptqCodes {
  std::vector<uint8_t> codes;
  std::vector<float> scale, zero;
  GptqResult result;
};

// Hessian of tokens, whose column 2 is always 0 where there is one.
std::vector<float> hessian_of(int64_t cols, int64_t tokens) {
  cases::Sample x = cases::sample("normal", tokens, cols, QTR_F32, 0, 5);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t j = 1; j < cols; ++j) {
      float& number = x.values[static_cast<size_t>(t * cols + j)];
      number = j == 2 ? 0 : number / 2 + x.at(t, j - 1) / 2;
    }
  std::vector<float> sum(static_cast<size_t>(cols * cols));
  hessian_accumulate({sizeof(HessianAccumulateArgs), {sum.data(), cols, cols, cols, QTR_F32}, x.view()});
  return sum;
}

class GptqRun {
 public:
  GptqRun(const GptqCase& c, const std::vector<float>& hessian, const cases::Sample& w)
      : case_(c),
        hessian_(hessian),
        w_(w),
        groups_(c.rows * group_count(1, c.cols, c.group, 1)),
        scale_(cases::sample("normal", c.rows, groups_ / c.rows, c.half ? QTR_F16 : QTR_F32)),
        zero_(cases::sample("normal", c.rows, groups_ / c.rows, c.half ? QTR_F16 : QTR_F32, 0, 1)) {
    for (int64_t row = 0; row <= c.rows; ++row) offsets_.push_back(row == 0 ? 0 : 2 * row - 1);
    for (int64_t i = 0; i < offsets_.back(); ++i) columns_.push_back(static_cast<int32_t>(i * 5 % c.cols));
  }

  GptqCodes on_host() const {
    GptqCodes out = empty();
    GptqArgs args = of(out.codes.data(), out.scale.data(), out.zero.data(), out.result);
    args.w = w_.view();
    if (!case_.fitted) args.scale = scale_.view(), args.zero = zero_.view();
    if (case_.sym) args.zero = {};
    if (case_.excludes) args.exclude_row_offsets = offsets_.data(), args.exclude_columns = columns_.data();
    gptq(args);
    return out;
  }

  GptqCodes on_device() const {
    GptqCodes out = empty();
    const Input w(w_), scale(scale_), zero(zero_);
    const DeviceArray<uint8_t> codes(out.codes.size());
    const DeviceArray<float> fitted_scale(out.scale.size()), fitted_zero(out.zero.size());
    const DeviceArray<int64_t> offsets(offsets_);
    const DeviceArray<int32_t> columns(columns_);
    GptqArgs args = of(codes.data(), fitted_scale.data(), fitted_zero.data(), out.result);
    args.w = w.m;
    if (!case_.fitted) args.scale = scale.m, args.zero = zero.m;
    if (case_.sym) args.zero = {};
    if (case_.excludes) args.exclude_row_offsets = offsets.data(), args.exclude_columns = columns.data();
    args.device = kDevice;
    gptq(args);
    out.codes = codes.read();
    if (case_.fitted) out.scale = fitted_scale.read(), out.zero = fitted_zero.read();
    return out;
  }

 private:
  GptqCodes empty() const {
    const auto fitted = static_cast<size_t>(case_.fitted ? groups_ : 0);
    return {std::vector<uint8_t>(static_cast<size_t>(case_.rows * row_bytes(case_.cols, case_.bits))),
            std::vector<float>(fitted), std::vector<float>(case_.sym ? 0 : fitted), GptqResult{}};
  }

  GptqArgs of(uint8_t* codes, float* fitted_scale, float* fitted_zero, GptqResult& result) const {
    GptqArgs args{};
    args.struct_size = sizeof(args);
    args.hessian = hessian_.data();
    args.hessian_size = static_cast<int64_t>(hessian_.size());
    args.bits = case_.bits;
    args.group_size = case_.group;
    args.damp = case_.damp;
    args.ordered = case_.ordered;
    args.codes = codes;
    args.codes_size = case_.rows * row_bytes(case_.cols, case_.bits);
    args.result = &result;
    if (!case_.fitted) return args;
    args.fitted_scale = fitted_scale;
    args.fitted_zero = case_.sym ? nullptr : fitted_zero;
    args.fitted_size = groups_;
    args.solver = case_.mse ? QTR_MSE : QTR_MINMAX;
    args.half = case_.half;
    return args;
  }

  const GptqCase& case_;
  const std::vector<float>& hessian_;
  const cases::Sample& w_;
  int64_t groups_;
  cases::Sample scale_, zero_;
  std::vector<int64_t> offsets_;
  std::vector<int32_t> columns_;
};

void expect_same_gptq(const GptqCase& c, const std::vector<float>& hessian) {
  SCOPED_TRACE(std::to_string(c.rows) + " x " + std::to_string(c.cols) + ", group " +
               std::to_string(c.group) + (c.ordered ? ", ordered" : "") + (c.excludes ? ", excludes" : "") +
               (c.fitted ? ", fitted" : "") + (c.mse ? ", mse" : "") + (c.sym ? ", sym" : "") +
               (c.half ? ", half" : ""));
  const cases::Sample w = cases::sample("normal", c.rows, c.cols, c.dtype, c.cols % 3);
  const GptqRun run(c, hessian, w);
  const GptqCodes host = run.on_host(), device = run.on_device();
  expect_same(device.codes, host.codes);
  expect_same(device.scale, host.scale);
  expect_same(device.zero, host.zero);
  EXPECT_EQ(device.result.loss, host.result.loss);
  EXPECT_EQ(device.result.damp, host.result.damp);
  EXPECT_EQ(device.result.dead, host.result.dead);
}

TEST_F(OnDevice, Gptq) {
  size_t n = 0;  // what has no loop of its own goes in turns
  for (const int64_t cols : {1, 7, 129, 300})
    for (const int64_t group : {int64_t{-1}, int64_t{5}, int64_t{32}, int64_t{48}, int64_t{128}})
      for (const bool ordered : {false, true})
        for (const bool fitted : {false, true}) {
          if (cols < 100 && group > 5) continue;
          const int64_t rows = cols == 300 && n % 3 == 0 ? 131 : 3 + static_cast<int64_t>(n % 17);
          expect_same_gptq({rows, cols, group, cases::kDTypes[n % 3], static_cast<int>(2 + n % 4), ordered,
                            n % 2 == 1, fitted, n % 5 < 2, n % 7 < 2, n % 4 < 2},
                           hessian_of(cols, 200));
          ++n;
        }
}

// Hessians that need more damping, or that none makes positive definite.
TEST_F(OnDevice, GptqOfHessiansThatAreNotPositiveDefinite) {
  std::vector<float> hessian = hessian_of(40, 10);
  for (const double damp : {0.0, 0.01}) {
    GptqCase c{20, 40, 16, QTR_F32, 3, true, true, false, false, false, false};
    c.damp = damp;
    expect_same_gptq(c, hessian);
    c.fitted = true;
    expect_same_gptq(c, hessian);
  }
  hessian[1 * 40 + 0] = 1e6f;
  for (const bool fitted : {false, true})
    expect_same_gptq({20, 40, 16, QTR_F32, 3, false, false, fitted, true, false, false}, hessian);
}

TEST_F(OnDevice, GptqOfASumThatIsNoNumberGivesCodeZero) {
  const GptqCase c{2, 2, 1, QTR_F32, 3, false, false, false, false, true, false};
  cases::Sample w = cases::sample("zero", 2, 2, QTR_F32);
  w.values = {3e38f, 3e38f, 1, 2};
  const std::vector<float> hessian(4, 1);
  const GptqRun run(c, hessian, w);
  expect_same(run.on_device().codes, run.on_host().codes);
}

TEST_F(OnDevice, GptqRefusesWhatTheCpuRefuses) {
  const auto refusal = [](const auto& run) {
    try {
      run();
    } catch (const InvalidArgument& e) {
      return std::string(e.what());
    }
    return std::string("taken");
  };
  const auto same = [&](const GptqCase& c, const std::vector<float>& hessian, const cases::Sample& w) {
    const GptqRun run(c, hessian, w);
    const std::string host = refusal([&] { static_cast<void>(run.on_host()); });
    EXPECT_NE(host, "taken");
    EXPECT_EQ(refusal([&] { static_cast<void>(run.on_device()); }), host);
  };
  const GptqCase given{5, 40, 16, QTR_F32, 3, true, false, false, false, false, false};
  const std::vector<float> hessian = hessian_of(40, 100);
  const cases::Sample w = cases::sample("normal", 5, 40, QTR_F32);
  cases::Sample bad = w;
  bad.values[3 * 40 + 7] = INFINITY;
  same(given, hessian, bad);
  std::vector<float> other = hessian;
  other[3 * 40 + 1] = NAN;
  same(given, other, w);
  other = hessian;
  other[0] = -1;
  same(given, other, w);
  same(given, std::vector<float>(39), w);
  GptqCase fitted = given;
  fitted.fitted = true;
  fitted.bits = 9;
  same(fitted, hessian, w);
  fitted.bits = 3;
  bad = w;
  bad.values[2 * 40 + 20] = 3e38f;
  bad.values[2 * 40 + 21] = -3e38f;
  same(fitted, hessian, bad);

  // A grid that is not finite.
  const Input there(w);
  const DeviceArray<float> scale(std::vector<float>{1, 1, NAN, 1, 1});
  const DeviceArray<uint8_t> codes(static_cast<size_t>(5 * row_bytes(40, 3)));
  GptqResult result;
  GptqArgs args{};
  args.struct_size = sizeof(args);
  args.w = there.m;
  args.hessian = hessian.data();
  args.hessian_size = 1600;
  args.bits = 3;
  args.group_size = -1;
  args.scale = {scale.data(), 5, 1, 1, QTR_F32};
  args.codes = codes.data();
  args.codes_size = 5 * row_bytes(40, 3);
  args.result = &result;
  args.device = kDevice;
  EXPECT_EQ(refusal([&] { gptq(args); }), "[gptq] scale must be finite: got value=nan, group=2");
  const std::vector<float> ones(5, 1);
  const DeviceArray<float> good(ones);
  args.scale.data = good.data();
  const DeviceArray<int64_t> offsets(std::vector<int64_t>{0, 1, 1, 1, 1, 1});
  const DeviceArray<int32_t> columns(std::vector<int32_t>{40});
  args.exclude_row_offsets = offsets.data();
  args.exclude_columns = columns.data();
  EXPECT_EQ(refusal([&] { gptq(args); }),
            "[gptq] exclude must have row_offsets from 0 that ascend, and lie within w: got row=0");
}

}  // namespace
}  // namespace quantrature
