#include <cmath>
#include <cstring>

#include "cases.hpp"

namespace quantrature {
namespace {

const std::vector<Trellis> kTrellises = [] {
  std::vector<Trellis> all;
  for (auto code : {QTR_1MAD, QTR_3INST, QTR_HYB})
    for (int bits = 1; bits <= 4; ++bits)
      for (int state_bits : {8, 11, 16}) all.push_back({code, bits, state_bits});
  return all;
}();

std::string name_of(const Trellis& t) {
  return "code " + std::to_string(t.code) + ", bits " + std::to_string(t.bits) + ", state bits " +
         std::to_string(t.state_bits);
}

std::vector<uint8_t> random_bytes(int64_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::vector<uint8_t> bytes(static_cast<size_t>(count));
  for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(generator());
  return bytes;
}

std::vector<float> values_of(const Trellis& t) {
  std::vector<float> values(static_cast<size_t>(trellis_step_weights(t.code)) << t.state_bits);
  trellis_values(
      {sizeof(TrellisValuesArgs), t.code, t.state_bits, values.data(), static_cast<int64_t>(values.size())});
  return values;
}

std::vector<float> decoded(const std::vector<uint8_t>& codes, int64_t rows, int64_t cols, const Trellis& t,
                           float scale) {
  std::vector<float> out(static_cast<size_t>(rows * cols), std::numeric_limits<float>::quiet_NaN());
  trellis_dequantize({sizeof(TrellisDequantizeArgs),
                      codes.data(),
                      static_cast<int64_t>(codes.size()),
                      t,
                      scale,
                      {out.data(), rows, cols, cols, QTR_F32}});
  return out;
}

// Bits of the stream as a number, around its end.
uint32_t window(const uint8_t* stream, int64_t total, int64_t begin, int n) {
  uint32_t bits = 0;
  for (int64_t i = begin; i < begin + n; ++i)
    bits = 2 * bits + (stream[i % total / 8] >> (7 - i % total % 8) & 1);
  return bits;
}

TEST(TrellisValues, AreTheCodesOfThePaper) {
  const std::vector<float> mad = values_of({QTR_1MAD, 2, 16}), inst = values_of({QTR_3INST, 2, 16});
  const std::vector<float> first = {-185, -124, -63, -2, 59, -135, -74, -13};
  const std::vector<uint16_t> halves = {0x3a25, 0xbb5b, 0x3b74, 0x34b6, 0x3924, 0x2cb0, 0x404f, 0xb906};
  for (size_t i = 0; i < 8; ++i) {
    EXPECT_EQ(mad[i], first[i]);
    EXPECT_EQ(inst[i], f32_from_f16(halves[i]));
  }
  double sum = 0, squares = 0;
  for (float value : mad)
    sum += static_cast<double>(value), squares += static_cast<double>(value) * static_cast<double>(value);
  EXPECT_EQ(sum, -3816);
  EXPECT_EQ(squares, 1431886798);
}

TEST(TrellisDequantize, ReadsWindowsOfTheStream) {
  for (const Trellis& t : kTrellises)
    for (int64_t cols : {64, 256, 258}) {
      SCOPED_TRACE(name_of(t) + ", cols " + std::to_string(cols));
      const int64_t total = cols * t.bits, bytes = (total + 7) / 8;
      const std::vector<uint8_t> codes = random_bytes(3 * bytes, 1);
      const std::vector<float> values = values_of(t);
      double squares = 0;
      for (float value : values) squares += static_cast<double>(value) * static_cast<double>(value);
      const auto factor = static_cast<float>(1.5 / std::sqrt(squares / static_cast<double>(values.size())));
      const int per_step = trellis_step_weights(t.code);
      cases::on_every_target([&] {
        const std::vector<float> out = decoded(codes, 3, cols, t, 1.5f);
        for (int64_t i = 0; i < 3 * cols; ++i) {
          const int64_t step = i % cols / per_step;
          const uint32_t state =
              window(codes.data() + i / cols * bytes, total, step * t.bits * per_step, t.state_bits);
          ASSERT_EQ(out[static_cast<size_t>(i)],
                    values[static_cast<size_t>(state * static_cast<uint32_t>(per_step) +
                                               static_cast<uint32_t>(i % cols % per_step))] *
                        factor)
              << i;
        }
      });
    }
}

TEST(TrellisDequantize, RoundsToHalves) {
  const Trellis t{QTR_3INST, 2, 16};
  const std::vector<uint8_t> codes = random_bytes(64, 1);
  const std::vector<float> wide = decoded(codes, 1, 256, t, 0.1f);
  std::vector<uint16_t> half(256);
  trellis_dequantize(
      {sizeof(TrellisDequantizeArgs), codes.data(), 64, t, 0.1f, {half.data(), 1, 256, 256, QTR_BF16}});
  for (size_t i = 0; i < 256; ++i) EXPECT_EQ(half[i], bf16_from_f32(wide[i]));
}

// The weights of a tiled matrix, row after row.
std::vector<float> tiled(const std::vector<uint8_t>& codes, int64_t rows, int64_t cols, const Trellis& t,
                         float scale) {
  const std::vector<float> tiles = decoded(codes, rows * cols / 256, 256, t, scale);
  std::vector<float> w(tiles.size());
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < cols; ++j)
      w[static_cast<size_t>(i * cols + j)] =
          tiles[static_cast<size_t>((i / 16 * (cols / 16) + j / 16) * 256 + i % 16 * 16 + j % 16)];
  return w;
}

std::vector<float> product(const std::vector<uint8_t>& codes, int64_t rows, int64_t cols, const Trellis& t,
                           float scale, const cases::Sample& x) {
  std::vector<float> y(static_cast<size_t>(x.rows * rows), std::numeric_limits<float>::quiet_NaN());
  trellis_matvec({sizeof(TrellisMatvecArgs),
                  codes.data(),
                  static_cast<int64_t>(codes.size()),
                  rows,
                  cols,
                  t,
                  scale,
                  x.view(),
                  {y.data(), x.rows, rows, rows, QTR_F32}});
  return y;
}

TEST(TrellisMatvec, IsWithinTheBoundOnEveryTarget) {
  for (const Trellis& t : kTrellises)
    for (DType dtype : {QTR_F32, QTR_F16}) {
      SCOPED_TRACE(name_of(t));
      const std::vector<uint8_t> codes = random_bytes(32 * 80 * t.bits / 8, 2);
      const std::vector<float> w = tiled(codes, 32, 80, t, 0.3f);
      const cases::Sample x = cases::sample("normal", 11, 80, dtype, 3);
      cases::on_every_target([&] {
        const std::vector<float> y = product(codes, 32, 80, t, 0.3f, x);
        for (int64_t v = 0; v < 11; ++v)
          for (int64_t i = 0; i < 32; ++i) {
            long double sum = 0, size = 0;
            for (int64_t j = 0; j < 80; ++j) {
              const long double term =
                  static_cast<long double>(w[static_cast<size_t>(i * 80 + j)]) * x.at(v, j);
              sum += term, size += std::abs(term);
            }
            ASSERT_LE(std::abs(static_cast<long double>(y[static_cast<size_t>(v * 32 + i)]) - sum),
                      0x1p-23L * (80 / 4 + 32) * size);
          }
      });
    }
}

TEST(TrellisMatvec, ThreadsAndOtherVectorsChangeNothing) {
  const Trellis t{QTR_HYB, 2, 16};
  const std::vector<uint8_t> codes = random_bytes(640 * 512 / 4, 3);
  const cases::Sample all = cases::sample("normal", 10, 512, QTR_F32);
  std::vector<float> expected;
  std::string of;
  cases::on_every_target([&] {
    const std::vector<float> y = product(codes, 640, 512, t, 1, all);
    if (of == target()) {
      EXPECT_EQ(y, expected);
    }
    of = target(), expected = y;
    for (int64_t v = 0; v < 10; v += 3) {
      cases::Sample one = all;
      one.rows = 1;
      one.values.assign(all.values.begin() + v * 512, all.values.begin() + (v + 1) * 512);
      const std::vector<float> alone = product(codes, 640, 512, t, 1, one);
      EXPECT_EQ(std::memcmp(alone.data(), y.data() + v * 640, 640 * sizeof(float)), 0);
    }
  });
}

TEST(TrellisMatvec, VectorsThatAreNotFiniteLeaveNoResultFinite) {
  const std::vector<uint8_t> codes = random_bytes(48 * 80 / 4, 4);
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()})
    for (const auto code : {QTR_1MAD, QTR_3INST, QTR_HYB}) {
      cases::Sample x = cases::sample("normal", 2, 80, QTR_F32);
      x.values[80 + 33] = bad;
      cases::on_every_target([&] {
        const std::vector<float> y = product(codes, 48, 80, Trellis{code, 2, 16}, 1, x);
        for (size_t i = 0; i < 48; ++i) {
          EXPECT_TRUE(std::isfinite(y[i]));
          EXPECT_FALSE(std::isfinite(y[48 + i]));
        }
      });
    }
}

template <class Op, class Args, class Change>
void refuses(Op op, Args args, Change&& change, const char* message) {
  change(args);
  try {
    op(args);
    ADD_FAILURE() << "accepted, expected: " << message;
  } catch (const InvalidArgument& e) {
    EXPECT_NE(std::string(e.what()).find(message), std::string::npos) << e.what();
  }
}

TEST(Trellis, RefusesWhatBreaksTheContract) {
  const std::vector<uint8_t> codes = random_bytes(128, 1);
  std::vector<float> out(512);
  const cases::Sample x = cases::sample("normal", 1, 32, QTR_F32);
  const TrellisDequantizeArgs d{sizeof(TrellisDequantizeArgs),     codes.data(), 128, {QTR_3INST, 2, 16}, 1,
                                {out.data(), 2, 256, 256, QTR_F32}};
  trellis_dequantize(d);
  using D = TrellisDequantizeArgs;
  refuses(
      trellis_dequantize, d, [](D& a) { a.trellis.code = static_cast<qtr_trellis_code>(3); },
      "[trellis_dequantize] code must be 1mad, 3inst or hyb: got code=3");
  refuses(trellis_dequantize, d, [](D& a) { a.trellis.bits = 5; }, "bits must be 1 to 4: got bits=5");
  refuses(trellis_dequantize, d, [](D& a) { a.trellis.state_bits = 17; }, "at most 16: got state_bits=17");
  refuses(
      trellis_dequantize, d, [](D& a) { a.trellis = {QTR_HYB, 4, 7}; },
      "state_bits must be at least the bits of a step and at most 16: got state_bits=7, bits of a step=8");
  refuses(trellis_dequantize, d, [](D& a) { a.scale = NAN; }, "scale must be finite");
  refuses(trellis_dequantize, d, [](D& a) { a.codes_size = 127; }, "codes must hold a stream for each row");
  refuses(trellis_dequantize, d, [](D& a) { a.out.cols = 7; }, "columns must have at least state_bits bits");
  refuses(
      trellis_dequantize, d, [](D& a) { a.trellis.code = QTR_HYB, a.out.cols = 255; },
      "columns must be a multiple of the weights of a step: got cols=255");
  const TrellisMatvecArgs m{
      sizeof(TrellisMatvecArgs),       codes.data(), 128, 16, 32, {QTR_3INST, 2, 16}, 1, x.view(),
      {out.data(), 1, 16, 16, QTR_F32}};
  trellis_matvec(m);
  using M = TrellisMatvecArgs;
  refuses(
      trellis_matvec, m, [](M& a) { a.rows = 15; }, "rows and columns must be multiples of 16: got rows=15");
  refuses(trellis_matvec, m, [](M& a) { a.codes = nullptr; }, "codes must not be null");
  refuses(trellis_matvec, m, [](M& a) { a.x.cols = 31; }, "x must have as many numbers");
  refuses(
      trellis_matvec, m, [](M& a) { a.out.dtype = QTR_F16; }, "out must be float32, a row for each vector");
  const TrellisValuesArgs v{sizeof(TrellisValuesArgs), QTR_3INST, 8, out.data(), 256};
  trellis_values(v);
  refuses(trellis_values, v, [](TrellisValuesArgs& a) { a.state_bits = 1; }, "state_bits must be 2 to 16");
  refuses(
      trellis_values, v, [](TrellisValuesArgs& a) { a.out_count = 255; },
      "out must hold the values of all states");
}

}  // namespace
}  // namespace quantrature
