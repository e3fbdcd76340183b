// What is known of a trellis before anything is read: the table of its pairs, and the size of its numbers.
#pragma once

#include <array>
#include <cmath>
#include <mutex>
#include <numbers>

#include "ops/trellis/reader.hpp"

namespace quantrature {

inline constexpr int kMaxStateBits = 16;

inline const uint32_t* hyb_pairs() {
  static const std::array<uint32_t, kHybEntries> pairs = [] {
    std::array<uint32_t, kHybEntries> made{};
    const double turn = std::numbers::pi * (std::sqrt(5.0) - 1);
    for (int i = 0; i < kHybEntries; ++i) {
      const double radius = std::sqrt(-2 * std::log(1 - (i + 0.5) / kHybEntries));
      const auto half = [](double value) { return uint32_t{f16_from_f32(static_cast<float>(value))}; };
      made[static_cast<size_t>(i)] = half(radius * std::cos(turn * i)) | half(radius * std::sin(turn * i))
                                                                             << 16;
    }
    return made;
  }();
  return pairs.data();
}

inline TrellisReader reader_of(qtr_trellis_code code, int bits, int state_bits) {
  const int per_step = code == QTR_HYB ? 2 : 1;
  return {code, bits, state_bits, per_step, bits * per_step, 1, code == QTR_HYB ? hyb_pairs() : nullptr};
}

inline double root_mean_square(const TrellisReader& reader) {
  double sum = 0;
  for (uint32_t state = 0; state < 1u << reader.state_bits; ++state) {
    float raw[2];
    raw_values(reader, state, raw);
    for (int v = 0; v < reader.per_step; ++v)
      sum += static_cast<double>(raw[v]) * static_cast<double>(raw[v]);
  }
  return std::sqrt(sum / (static_cast<double>(1u << reader.state_bits) * reader.per_step));
}

inline double trellis_rms(const TrellisReader& reader) {
  static std::array<std::once_flag, 3 * (kMaxStateBits + 1)> once;
  static std::array<double, 3 * (kMaxStateBits + 1)> rms;
  const auto slot =
      static_cast<size_t>(static_cast<int>(reader.code) * (kMaxStateBits + 1) + reader.state_bits);
  std::call_once(once[slot], [&] { rms[slot] = root_mean_square(reader); });
  return rms[slot];
}

// The reader of a trellis that was checked.
inline TrellisReader trellis_reader_of(const Trellis& trellis) {
  TrellisReader reader = reader_of(trellis.code, trellis.bits, trellis.state_bits);
  reader.rms = trellis_rms(reader);
  return reader;
}

}  // namespace quantrature
