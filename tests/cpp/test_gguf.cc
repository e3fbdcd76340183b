#include <algorithm>
#include <cmath>
#include <cstring>

#include "cases.hpp"
#include "ops/gguf/layout.hpp"
#include "runtime/dispatch.hpp"

namespace quantrature {
namespace {

using Bytes = std::vector<uint8_t>;

std::vector<GgufTypeInfo> types() {
  std::vector<GgufTypeInfo> all;
  for (int32_t i = 0; i < gguf_type_count(); ++i) all.push_back(gguf_type(i));
  return all;
}

Bytes quantized(const Matrix& w, qtr_gguf_type type, const Matrix& weights = {}) {
  Bytes data(static_cast<size_t>(w.rows * gguf_row_bytes(type, w.cols)));
  gguf_quantize({sizeof(GgufQuantizeArgs), w, type, weights, data.data(), static_cast<int64_t>(data.size())});
  return data;
}

// The values, and between and beside them `padding` numbers that stay as they are.
std::vector<float> values_of(const Bytes& data, qtr_gguf_type type, int64_t rows, int64_t cols,
                             int64_t padding = 0) {
  std::vector<float> out(static_cast<size_t>(rows * (cols + padding)), -7.0f);
  gguf_dequantize({sizeof(GgufDequantizeArgs), data.data(), static_cast<int64_t>(data.size()), type,
                   MutableMatrix{out.data(), rows, cols, cols + padding, QTR_F32}});
  return out;
}

Bytes random_bytes(size_t size, unsigned seed) {
  std::mt19937 generator(seed);
  Bytes data(size);
  for (uint8_t& byte : data) byte = static_cast<uint8_t>(generator());
  return data;
}

// By bits, as a zero may have a sign; a NaN may have any bits.
void expect_same(const std::vector<float>& a, const std::vector<float>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i)
    ASSERT_TRUE((std::isnan(a[i]) && std::isnan(b[i])) || std::memcmp(&a[i], &b[i], sizeof(float)) == 0)
        << "number " << i << ": " << a[i] << ", " << b[i];
}

cases::Sample weights_for(const cases::Sample& w, bool each, unsigned seed = 5) {
  cases::Sample weights = cases::sample("tails", each ? w.rows : 1, w.cols, QTR_F32, 3, seed);
  for (float& x : weights.values) x = std::abs(x);
  return weights;
}

double error_of(const cases::Sample& w, const std::vector<float>& values,
                const cases::Sample* weights = nullptr) {
  double sum = 0;
  for (int64_t row = 0; row < w.rows; ++row)
    for (int64_t col = 0; col < w.cols; ++col) {
      const double apart = static_cast<double>(w.at(row, col)) -
                           static_cast<double>(values[static_cast<size_t>(row * w.cols + col)]);
      sum += apart * apart *
             (weights ? static_cast<double>(weights->at(weights->rows > 1 ? row : 0, col)) : 1.0);
    }
  return sum;
}

TEST(Gguf, EveryTargetDecodesTheSame) {
  for (const GgufTypeInfo& type : types())
    for (int64_t blocks : {1, 3}) {
      SCOPED_TRACE(std::string(type.name) + ", blocks " + std::to_string(blocks));
      const int64_t rows = 5, cols = blocks * type.block_size;
      const Bytes data = random_bytes(static_cast<size_t>(rows * blocks * type.block_bytes), 1);
      const auto expected = cases::on_reference([&] { return values_of(data, type.type, rows, cols, 2); });
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t col = cols; col < cols + 2; ++col)
          ASSERT_EQ(expected[static_cast<size_t>(row * (cols + 2) + col)], -7.0f);
      cases::on_every_target([&] { expect_same(values_of(data, type.type, rows, cols, 2), expected); });
    }
}

// Blocks written by hand from the description of the types.
TEST(Gguf, DecodesWhatTheTypesSay) {
  Bytes q4(18, 0x21);          // codes 1, then 2
  q4[0] = 0x00, q4[1] = 0x40;  // d = 2
  std::vector<float> expected(32, -14.0f);
  std::fill_n(expected.begin() + 16, 16, -12.0f);
  expect_same(values_of(q4, QTR_GGUF_Q4_0, 1, 32), expected);

  Bytes q2(84, 0);
  std::fill_n(q2.begin(), 16, uint8_t{0x23});       // scale 3, minimum 2
  std::fill_n(q2.begin() + 16, 64, uint8_t{0xE4});  // codes 0, 1, 2, 3 of stretches of 32
  q2[81] = 0x3C, q2[83] = 0x38;                     // d = 1, dmin = 0.5
  const std::vector<float> values = values_of(q2, QTR_GGUF_Q2_K, 1, 256);
  for (size_t i = 0; i < 256; ++i) EXPECT_EQ(values[i], 3 * static_cast<float>(i / 32 % 4) - 1);
}

TEST(Gguf, EveryTargetFindsTheSameBlocks) {
  for (const GgufTypeInfo& type : types())
    for (const std::string& kind : cases::kKinds) {
      const DType dtype = cases::kDTypes[kind.size() % 3];
      SCOPED_TRACE(std::string(type.name) + ", " + kind + ", dtype " + std::to_string(dtype));
      cases::Sample w = cases::sample(kind, 3, 256, dtype, static_cast<int64_t>(kind.size() % 2));
      for (size_t i = 0; i < w.values.size(); ++i)
        if (!(std::abs(w.values[i]) <= 65504)) {
          w.values[i] = 1;
          if (dtype != QTR_F32) w.bits[i] = dtype == QTR_F16 ? f16_from_f32(1) : bf16_from_f32(1);
        }
      const cases::Sample of_columns = weights_for(w, false), of_all = weights_for(w, true);
      for (const Matrix& weights : {Matrix{}, of_columns.view(), of_all.view()}) {
        const Bytes expected = cases::on_reference([&] { return quantized(w.view(), type.type, weights); });
        for (float value : values_of(expected, type.type, w.rows, w.cols)) ASSERT_TRUE(std::isfinite(value));
        cases::on_every_target([&] { EXPECT_EQ(quantized(w.view(), type.type, weights), expected); });
      }
    }
}

// The kernels of the fit against sums in wider arithmetic.
TEST(Gguf, ErrorsAndLinesAreThoseOfLeastSquares) {
  cases::Sample x = cases::sample("normal", 1, 32, QTR_F32), weights = weights_for(x, true);
  for (const GgufRun& run :
       {GgufRun{x.values.data(), weights.values.data(), 32, 0, 15, nullptr},
        GgufRun{x.values.data(), weights.values.data(), 32, -127, 113, kGgufTable.data()}}) {
    GgufLines lines{};
    const bool table = run.table != nullptr;
    for (int i = 0; i < kGgufLines; ++i) {
      lines.scale[i] = (table ? 0.01f : 0.15f) * (1 + 0.1f * static_cast<float>(i));
      lines.offset[i] = table ? 0 : -1.5f;
    }
    std::vector<float> code(32);
    cases::on_every_target([&] {
      float errors[kGgufLines], after[kGgufLines];
      kernels().gguf_errors(run, lines, errors);
      GgufLines solved = lines;
      kernels().gguf_solve(run, table ? GgufOffset::kNone : GgufOffset::kAny, solved);
      kernels().gguf_errors(run, solved, after);
      for (int i = 0; i < kGgufLines; ++i) {
        EXPECT_LE(after[i], errors[i] * 1.00001f);
        uint8_t codes[32];
        kernels().gguf_codes(run, lines.scale[i], lines.offset[i], codes);
        double expected = 0, gradient_scale = 0, gradient_offset = 0, all = 0;
        for (size_t j = 0; j < 32; ++j) {
          const double q = table ? kGgufTable[codes[j]] : codes[j], weight = weights.values[j];
          const auto apart = [&](double scale, double offset) {
            return static_cast<double>(x.values[j]) - (scale * q + offset);
          };
          const double found = apart(lines.scale[i], lines.offset[i]);
          expected += weight * found * found;
          for (int other = 0; other < 16; ++other) {
            const double entry = table ? kGgufTable[static_cast<size_t>(other)] : other;
            EXPECT_LE(std::abs(found), std::abs(static_cast<double>(x.values[j]) - entry * lines.scale[i] -
                                                static_cast<double>(lines.offset[i])) +
                                           1e-5);
          }
          const double left = weight * apart(solved.scale[i], solved.offset[i]);
          gradient_scale += left * q, gradient_offset += left, all += std::abs(weight * q);
        }
        EXPECT_NEAR(errors[i], expected, 1e-5 * expected);
        EXPECT_NEAR(gradient_scale, 0, 1e-4 * all);
        EXPECT_NEAR(table ? 0 : gradient_offset, 0, 1e-4 * all);
      }
    });
  }
}

// Of all scales that float16 has.
TEST(Gguf, FindsNearlyTheBestScale) {
  const cases::Sample w = cases::sample("normal", 8, 32, QTR_F32), weights = weights_for(w, true);
  for (qtr_gguf_type type : {QTR_GGUF_Q4_0, QTR_GGUF_Q5_0, QTR_GGUF_IQ4_NL}) {
    const GgufLayout& layout = *gguf_layout(type);
    const auto found = values_of(quantized(w.view(), type, weights.view()), type, w.rows, w.cols);
    double least_of_all = 0;
    for (int64_t row = 0; row < w.rows; ++row) {
      double least = HUGE_VAL;
      for (int bits = 0; bits < 0x10000; ++bits) {
        const float d = f32_from_f16(static_cast<uint16_t>(bits));
        if (!(std::abs(d) < 1) || std::abs(d) < 0x1p-12f) continue;
        double error = 0;
        for (int64_t i = 0; i < 32 && error < least; ++i) {
          const double x = w.at(row, i);
          double apart = HUGE_VAL;
          if (layout.is_table()) {
            for (float entry : kGgufTable)
              apart = std::min(apart, std::abs(x - static_cast<double>(d * entry)));
          } else {
            const double code =
                std::clamp(std::nearbyint(x / d), -static_cast<double>(layout.zero), layout.zero - 1.0);
            apart = x - d * code;
          }
          error += weights.at(row, i) * apart * apart;
        }
        least = std::min(least, error);
      }
      least_of_all += least;
    }
    EXPECT_LE(error_of(w, found, &weights), 1.01 * least_of_all) << layout.info.name;
  }
}

TEST(Gguf, MatricesOfBlocksComeBack) {
  for (const GgufTypeInfo& type : types()) {
    const cases::Sample w = cases::sample("normal", 4, 256, QTR_F32);
    cases::Sample on_blocks = w;
    on_blocks.values = values_of(quantized(w.view(), type.type), type.type, 4, 256);
    const auto again = values_of(quantized(on_blocks.view(), type.type), type.type, 4, 256);
    EXPECT_LE(error_of(on_blocks, again), 0.05 * error_of(w, on_blocks.values)) << type.name;
  }
}

TEST(Gguf, ConstantRowsAreExact) {
  cases::Sample w = cases::sample("zero", 2, 256, QTR_F32);
  std::fill_n(w.values.begin() + 256, 256, -0.75f);
  for (const GgufTypeInfo& type : types())
    cases::on_every_target([&] {
      const auto values = values_of(quantized(w.view(), type.type), type.type, 2, 256);
      for (size_t i = 0; i < 512; ++i) EXPECT_NEAR(values[i], w.values[i], 0.002f) << type.name;
    });
}

TEST(Gguf, NumbersWithoutWeightDoNotCount) {
  cases::Sample w = cases::sample("normal", 1, 256, QTR_F32), weights = weights_for(w, true);
  std::fill(weights.values.begin(), weights.values.end(), 1.0f);
  for (size_t i = 0; i < 256; i += 9) w.values[i] = 1000, weights.values[i] = 0;
  for (const GgufTypeInfo& type : types()) {
    const auto values = values_of(quantized(w.view(), type.type, weights.view()), type.type, 1, 256);
    EXPECT_LT(error_of(w, values, &weights), 256 * (type.type == QTR_GGUF_Q2_K ? 0.15 : 0.05)) << type.name;
  }
}

TEST(Gguf, RefusesWhatBreaksTheContract) {
  cases::Sample w = cases::sample("normal", 3, 256, QTR_F32), weights = weights_for(w, true);
  Bytes data(3 * 144);
  std::vector<float> values(3 * 256);
  GgufQuantizeArgs good{};
  good.struct_size = sizeof(good);
  good.w = w.view();
  good.type = QTR_GGUF_Q4_K;
  good.weights = weights.view();
  good.data = data.data();
  good.data_size = static_cast<int64_t>(data.size());
  gguf_quantize(good);
  const GgufDequantizeArgs good_back{sizeof(GgufDequantizeArgs), data.data(), good.data_size, QTR_GGUF_Q4_K,
                                     MutableMatrix{values.data(), 3, 256, 256, QTR_F32}};
  gguf_dequantize(good_back);
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
    refuses(gguf_quantize, good, change, message);
  };
  quantizing([](auto& a) { a.w.rows = 0; }, "[gguf] w must not be empty");
  quantizing(
      [](auto& a) { a.type = static_cast<qtr_gguf_type>(1); },
      "[gguf] type must be that of Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K: got "
      "type=1");
  quantizing(
      [](auto& a) { a.w.cols = 224; },
      "[gguf] a matrix of type Q4_K must have columns in blocks of 256; choose another type (Q4_0, Q4_1, "
      "Q5_0, Q5_1, Q8_0, IQ4_NL): got cols=224");
  quantizing([](auto& a) { a.w.cols = 200; },
             "[gguf] a matrix of type Q4_K must have columns in blocks of 256: got cols=200");
  quantizing([](auto& a) { a.data = nullptr; }, "[gguf] data must not be null");
  quantizing([](auto& a) { a.data_size = 1; },
             "[gguf] data must hold all blocks of all rows: got data_size=1, expected=432");
  quantizing([](auto& a) { a.weights.rows = 2; },
             "[gguf] weights must have the columns of w, and one row or the rows of w: got rows=2, cols=256");
  quantizing([](auto& a) { a.weights.cols = 255; }, "[gguf] weights must have the columns of w");
  quantizing([](auto& a) { a.weights.dtype = QTR_F16; }, "[gguf] weights must be float32: got dtype=1");
  const auto with = [&](cases::Sample sample, size_t at, float value) {
    sample.values[at] = value;
    return sample;
  };
  const cases::Sample nan = with(w, 300, NAN), large = with(w, 700, -65505),
                      negative = with(weights, 260, -1), endless = with(weights, 1, INFINITY);
  cases::Sample none = weights;
  std::fill(none.values.begin(), none.values.end(), 0.0f);
  quantizing([&](auto& a) { a.w = nan.view(); }, "[gguf] w must be finite: got value=nan, row=1, col=44");
  quantizing(
      [&](auto& a) { a.w = large.view(); },
      "[gguf] w must lie within -65504 and 65504, as scales are float16: got value=-65505, row=2, col=188");
  quantizing([&](auto& a) { a.weights = negative.view(); },
             "[gguf] weights must be finite and not negative: got weight=-1, row=1, col=1");
  quantizing([&](auto& a) { a.weights = endless.view(); },
             "[gguf] weights must be finite and not negative: got weight=inf, row=0, col=1");
  quantizing([&](auto& a) { a.weights = none.view(); }, "[gguf] weights must not all be 0");
  const auto going_back = [&](auto&& change, const char* message) {
    refuses(gguf_dequantize, good_back, change, message);
  };
  going_back([](auto& a) { a.type = static_cast<qtr_gguf_type>(0); }, "[gguf] type must be that of Q4_0");
  going_back([](auto& a) { a.out.cols = 128; },
             "[gguf] a matrix of type Q4_K must have columns in blocks of 256");
  going_back([](auto& a) { a.data_size = 1; }, "[gguf] data must hold all blocks of all rows");
  going_back([](auto& a) { a.data = nullptr; }, "[gguf] data must not be null");
  going_back([](auto& a) { a.out.dtype = QTR_F16; }, "[gguf] out must be float32: got dtype=1");
  EXPECT_THROW(gguf_row_bytes(QTR_GGUF_Q8_0, INT64_MAX - 31), InvalidArgument);
  EXPECT_THROW(gguf_type(-1), InvalidArgument);
  EXPECT_THROW(gguf_type(gguf_type_count()), InvalidArgument);
}

}  // namespace
}  // namespace quantrature
