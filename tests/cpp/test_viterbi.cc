#include <cmath>

#include "cases.hpp"

namespace quantrature {
namespace {

std::vector<uint8_t> searched(const cases::Sample& x, const Trellis& t, float scale) {
  std::vector<uint8_t> codes(static_cast<size_t>(x.rows * ((x.cols * t.bits + 7) / 8)));
  trellis_quantize(
      {sizeof(TrellisQuantizeArgs), x.view(), t, scale, codes.data(), static_cast<int64_t>(codes.size())});
  return codes;
}

std::vector<float> decoded(const std::vector<uint8_t>& codes, int64_t rows, int64_t cols, const Trellis& t,
                           float scale) {
  std::vector<float> out(static_cast<size_t>(rows * cols));
  trellis_dequantize({sizeof(TrellisDequantizeArgs),
                      codes.data(),
                      static_cast<int64_t>(codes.size()),
                      t,
                      scale,
                      {out.data(), rows, cols, cols, QTR_F32}});
  return out;
}

double error(const cases::Sample& x, int64_t row, const std::vector<float>& y) {
  double sum = 0;
  for (int64_t i = 0; i < x.cols; ++i)
    sum += std::pow(static_cast<double>(x.at(row, i)) - static_cast<double>(y[static_cast<size_t>(i)]), 2);
  return sum;
}

// Every stream there is, each decoded: none is better than the search says, and none that has its seam is
// better than what it finds, up to the rounding of costs. The seam itself is found for long sequences only;
// on these short ones it is mostly right.
TEST(Viterbi, FindsTheBestOfAllStreams) {
  for (const Trellis& t :
       std::vector<Trellis>{{QTR_1MAD, 1, 3}, {QTR_3INST, 1, 5}, {QTR_HYB, 1, 4}, {QTR_3INST, 2, 6}}) {
    const int64_t rows = 40, cols = 14 / t.bits / 2 * 2, total = cols * t.bits;
    const int shared = t.state_bits - t.bits * trellis_step_weights(t.code);
    const cases::Sample x = cases::sample("normal", rows, cols, QTR_F32);
    const std::vector<uint8_t> codes = searched(x, t, 1);
    const std::vector<float> found = decoded(codes, rows, cols, t, 1);
    std::vector<double> least(static_cast<size_t>(rows), 1e9), least_of_seam(static_cast<size_t>(rows), 1e9);
    for (uint32_t bits = 0; bits < 1u << total; ++bits) {
      const uint32_t shifted = bits << (16 - total);
      std::vector<uint8_t> stream = {static_cast<uint8_t>(shifted >> 8), static_cast<uint8_t>(shifted)};
      const std::vector<float> y = decoded(stream, 1, cols, t, 1);
      for (size_t row = 0; row < static_cast<size_t>(rows); ++row) {
        const double e = error(x, static_cast<int64_t>(row), y);
        least[row] = std::min(least[row], e);
        if (uint32_t{codes[2 * row]} >> (8 - shared) == shifted >> (16 - shared))
          least_of_seam[row] = std::min(least_of_seam[row], e);
      }
    }
    int best = 0;
    for (size_t row = 0; row < static_cast<size_t>(rows); ++row) {
      const auto begin = found.begin() + static_cast<int64_t>(row) * cols;
      const double got = error(x, static_cast<int64_t>(row), {begin, begin + cols});
      ASSERT_GE(got, least[row] - 1e-9);
      ASSERT_LE(got, least_of_seam[row] + 2e-2);
      best += got <= least[row] + 2e-2;
    }
    EXPECT_GE(best, 20) << "code " << t.code << ", state bits " << t.state_bits;
  }
}

// The tail-biting walk of least cost for every seam there can be, in double: what the two passes approximate.
double least_error(const cases::Sample& x, int64_t row, const Trellis& t) {
  const int per_step = trellis_step_weights(t.code), step_bits = t.bits * per_step;
  const uint32_t states = 1u << t.state_bits, overlaps = states >> step_bits;
  std::vector<float> raw(static_cast<size_t>(states) * static_cast<size_t>(per_step));
  trellis_values(
      {sizeof(TrellisValuesArgs), t.code, t.state_bits, raw.data(), static_cast<int64_t>(raw.size())});
  double squares = 0;
  for (float value : raw) squares += static_cast<double>(value) * static_cast<double>(value);
  const double rms = std::sqrt(squares / static_cast<double>(raw.size()));
  double least = 1e300;
  for (uint32_t seam = 0; seam < overlaps; ++seam) {
    std::vector<double> costs(overlaps, 1e300);
    costs[seam] = 0;
    for (int64_t step = 0; step < x.cols / per_step; ++step) {
      std::vector<double> next(overlaps, 1e300);
      for (uint32_t s = 0; s < states; ++s) {
        double cost = costs[s >> step_bits];
        for (int v = 0; v < per_step; ++v)
          cost += std::pow(
              static_cast<double>(raw[s * static_cast<uint32_t>(per_step) + static_cast<uint32_t>(v)]) / rms -
                  static_cast<double>(x.at(row, step * per_step + v)),
              2);
        next[s % overlaps] = std::min(next[s % overlaps], cost);
      }
      costs = next;
    }
    least = std::min(least, costs[seam]);
  }
  return least;
}

TEST(Viterbi, IsAsGoodAsEverySeamTriedOnLongSequences) {
  for (const Trellis& t :
       std::vector<Trellis>{{QTR_1MAD, 1, 6}, {QTR_3INST, 2, 7}, {QTR_HYB, 2, 8}, {QTR_3INST, 4, 8}}) {
    const cases::Sample x = cases::sample("normal", 4, 256, QTR_F32);
    const std::vector<float> found = decoded(searched(x, t, 1), 4, 256, t, 1);
    for (int64_t row = 0; row < 4; ++row) {
      const double least = least_error(x, row, t);
      const double got = error(x, row, {found.begin() + row * 256, found.begin() + (row + 1) * 256});
      EXPECT_GE(got, least * (1 - 1e-6));
      EXPECT_LE(got, least * 1.005) << t.code;
    }
  }
}

TEST(Viterbi, IsTheSameOnEveryTarget) {
  for (auto code : {QTR_1MAD, QTR_3INST, QTR_HYB})
    for (int bits = 1; bits <= 4; ++bits)
      for (int state_bits : {8, 9, 12}) {
        const Trellis t{code, bits, state_bits};
        for (const char* kind : {"normal", "tails"}) {
          SCOPED_TRACE(std::string(kind) + " " + std::to_string(code) + " " + std::to_string(bits) + " " +
                       std::to_string(state_bits));
          const cases::Sample x = cases::sample(kind, 3, 40, QTR_F16, 5);
          const auto expected = cases::on_reference([&] { return searched(x, t, 0.9f); });
          cases::on_every_target([&] { ASSERT_EQ(searched(x, t, 0.9f), expected); });
        }
      }
}

TEST(Viterbi, ErrorsOfNormalNumbersAreThoseOfThePaper) {
  const cases::Sample x = cases::sample("normal", 60, 256, QTR_F32);
  const auto mean = [&](const Trellis& t, float scale) {
    const std::vector<float> y = decoded(searched(x, t, scale), 60, 256, t, scale);
    double sum = 0, norm = 0;
    for (int64_t row = 0; row < 60; ++row) {
      sum += error(x, row, {y.begin() + row * 256, y.begin() + (row + 1) * 256});
      for (int64_t i = 0; i < 256; ++i) norm += std::pow(static_cast<double>(x.at(row, i)), 2);
    }
    return sum / norm;
  };
  EXPECT_NEAR(mean({QTR_3INST, 2, 12}, 1.0f), 0.0735, 0.0015);
  EXPECT_NEAR(mean({QTR_1MAD, 2, 10}, 1.0f), 0.0785, 0.0015);
  EXPECT_NEAR(mean({QTR_1MAD, 4, 10}, 1.1f), 0.0060, 0.0006);
}

TEST(Viterbi, RefusesWhatBreaksTheContract) {
  cases::Sample x = cases::sample("normal", 2, 64, QTR_F32);
  std::vector<uint8_t> codes(32);
  const TrellisQuantizeArgs good{
      sizeof(TrellisQuantizeArgs), x.view(), {QTR_1MAD, 2, 8}, 1, codes.data(), 32};
  trellis_quantize(good);
  const auto refuses = [&](auto&& change, const char* message) {
    TrellisQuantizeArgs bad = good;
    change(bad);
    try {
      trellis_quantize(bad);
      ADD_FAILURE() << "accepted, expected: " << message;
    } catch (const InvalidArgument& e) {
      EXPECT_NE(std::string(e.what()).find(message), std::string::npos) << e.what();
    }
  };
  refuses([](TrellisQuantizeArgs& a) { a.scale = 0; },
          "[trellis_quantize] scale must be positive: got scale=0");
  refuses([](TrellisQuantizeArgs& a) { a.trellis.bits = 0; }, "[trellis_quantize] bits must be 1 to 4");
  refuses([](TrellisQuantizeArgs& a) { a.codes_size = 33; }, "[trellis_quantize] codes must hold a stream");
  refuses([](TrellisQuantizeArgs& a) { a.x.cols = 3; },
          "[trellis_quantize] columns must have at least state_bits");
  x.values[70] = std::numeric_limits<float>::infinity();
  refuses([](TrellisQuantizeArgs&) {}, "[trellis_quantize] x must be finite: got value=inf, row=1, column=6");
}

}  // namespace
}  // namespace quantrature
