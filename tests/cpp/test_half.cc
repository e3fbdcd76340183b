#include <algorithm>
#include <bit>

#include "cases.hpp"
#include "runtime/dispatch.hpp"

namespace quantrature {
namespace {

bool is_nan(uint16_t bits, int mantissa_bits) {
  const int exponent = 0x7FFF >> mantissa_bits << mantissa_bits;
  return (bits & 0x7FFF) > exponent;
}

// Every 16-bit pattern, widened and narrowed again by every target.
TEST(Half, EveryPatternSurvivesTheRoundTrip) {
  std::vector<uint16_t> all(65536), back(65536);
  std::vector<float> wide(65536);
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<uint16_t>(i);
  cases::on_every_target([&] {
    for (bool f16 : {true, false}) {
      (f16 ? kernels().f16_to_f32 : kernels().bf16_to_f32)(all.data(), wide.data(), 65536);
      (f16 ? kernels().f32_to_f16 : kernels().f32_to_bf16)(wide.data(), back.data(), 65536);
      int wrong = 0;
      for (size_t i = 0; i < all.size(); ++i) {
        const bool nan = is_nan(all[i], f16 ? 10 : 7);
        wrong += nan ? !std::isnan(wide[i]) || !is_nan(back[i], f16 ? 10 : 7) : back[i] != all[i];
      }
      EXPECT_EQ(wrong, 0) << (f16 ? "float16" : "bfloat16");
    }
  });
}

TEST(Half, KnownValues) {
  EXPECT_EQ(f32_from_f16(0x3C00), 1.0f);
  EXPECT_EQ(f32_from_f16(0x0001), std::ldexp(1.0f, -24));
  EXPECT_EQ(f32_from_f16(0xFBFF), -65504.0f);
  EXPECT_EQ(f32_from_bf16(0x3F80), 1.0f);
}

// A value halfway between two neighbours goes to the even one, and each side of it to the nearer one.
TEST(Half, RoundsToNearestEven) {
  std::vector<float> in;
  std::vector<uint16_t> f16_expected, bf16_expected;
  for (uint16_t low = 0; low < 0x7BFF; low = static_cast<uint16_t>(low + 7)) {
    const uint16_t high = static_cast<uint16_t>(low + 1);
    const uint16_t even = low % 2 == 0 ? low : high;
    const float middle = (f32_from_f16(low) + f32_from_f16(high)) / 2;
    in.insert(in.end(), {std::nextafter(middle, 0.0f), middle, std::nextafter(middle, 1e9f)});
    f16_expected.insert(f16_expected.end(), {low, even, high});
  }
  std::vector<uint16_t> got(in.size());
  cases::on_every_target([&] {
    kernels().f32_to_f16(in.data(), got.data(), static_cast<int64_t>(in.size()));
    EXPECT_EQ(got, f16_expected);
  });
  EXPECT_EQ(f16_from_f32(65520.0f), 0x7C00);
  EXPECT_EQ(f16_from_f32(std::nextafter(65520.0f, 0.0f)), 0x7BFF);
  EXPECT_EQ(bf16_from_f32(std::bit_cast<float>(0x3F808000u)), 0x3F80);
  EXPECT_EQ(bf16_from_f32(std::bit_cast<float>(0x3F818000u)), 0x3F82);
  EXPECT_EQ(bf16_from_f32(std::bit_cast<float>(0x3F808001u)), 0x3F81);
}

// Float32 numbers of all sizes, with what no 16-bit format has: the bits of the scalar definition, NaN with
// its payload included.
TEST(Half, EveryTargetRoundsAsDefined) {
  std::vector<float> in;
  for (uint32_t bits = 0; bits < 0xFFFFF000u - 4099; bits += 4099) in.push_back(std::bit_cast<float>(bits));
  in.resize(in.size() - in.size() % 16 + 3);
  std::vector<uint16_t> f16(in.size()), bf16(in.size());
  std::transform(in.begin(), in.end(), f16.begin(), [](float x) { return f16_from_f32(x); });
  std::transform(in.begin(), in.end(), bf16.begin(), [](float x) { return bf16_from_f32(x); });
  cases::on_every_target([&] {
    std::vector<uint16_t> got(in.size());
    kernels().f32_to_f16(in.data(), got.data(), static_cast<int64_t>(in.size()));
    EXPECT_EQ(got, f16);
    kernels().f32_to_bf16(in.data(), got.data(), static_cast<int64_t>(in.size()));
    EXPECT_EQ(got, bf16);
  });
}

// The bits of the scalar definition, for every pattern.
TEST(Half, EveryTargetWidensAsDefined) {
  std::vector<uint16_t> in(65536 + 5);
  std::vector<uint32_t> f16, bf16;
  for (size_t i = 0; i < in.size(); ++i) {
    in[i] = static_cast<uint16_t>(i);
    f16.push_back(std::bit_cast<uint32_t>(f32_from_f16(in[i])));
    bf16.push_back(std::bit_cast<uint32_t>(f32_from_bf16(in[i])));
  }
  cases::on_every_target([&] {
    std::vector<uint32_t> got(in.size());
    float* out = reinterpret_cast<float*>(got.data());
    kernels().f16_to_f32(in.data(), out, static_cast<int64_t>(in.size()));
    EXPECT_EQ(got, f16);
    kernels().bf16_to_f32(in.data(), out, static_cast<int64_t>(in.size()));
    EXPECT_EQ(got, bf16);
  });
}

}  // namespace
}  // namespace quantrature
