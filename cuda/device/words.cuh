// Codes out of words of packed rows whose planes are aligned (quantrature/packing.hpp).
#pragma once

#include "layout/planes.hpp"

namespace quantrature::cuda {

// Four neighbouring lanes of each plane of a chunk of 256 columns, of which the thread has the part that
// begins at column 64 q: code m of lane k is that of column 64 q + 8 m + (first lane) + k.
template <int kBits>
struct LaneWords {
  static constexpr int kLanes = 4;
  static constexpr bool kEight = kBits == 8;
  static constexpr bool kFour = !kEight && (kBits & 4) != 0, kTwo = !kEight && (kBits & 2) != 0,
                        kOne = !kEight && (kBits & 1) != 0;
  struct alignas(4 * kLanes) Lanes {
    uint32_t word[kLanes];
  };
  Lanes eight[2], four, two, one;

  QUANTRATURE_INLINE static Lanes lanes_at(const uint8_t* at) { return *reinterpret_cast<const Lanes*>(at); }

  // The chunk'th of a row, the lanes from kLanes * part on.
  QUANTRATURE_INLINE void read(const uint8_t* row, int64_t cols, int64_t chunk, int q, int part) {
    const int lane = 4 * kLanes * part;
    if constexpr (kEight) {
      eight[0] = lanes_at(row + chunk * 256 + q * 64 + lane);
      eight[1] = lanes_at(row + chunk * 256 + q * 64 + 32 + lane);
    }
    if constexpr (kFour) {
      four = lanes_at(row + chunk * 128 + q * 32 + lane);
      row += plane_bytes(4, cols);
    }
    if constexpr (kTwo) {
      two = lanes_at(row + chunk * 64 + q / 2 * 32 + lane);
      row += plane_bytes(2, cols);
      for (int k = 0; k < kLanes; ++k) two.word[k] >>= 16 * (q & 1);
    }
    if constexpr (kOne) {
      one = lanes_at(row + chunk * 32 + lane);
      for (int k = 0; k < kLanes; ++k) one.word[k] >>= 8 * q;
    }
  }

  QUANTRATURE_INLINE int number(int m, int k) const {
    uint32_t code = 0;
    if constexpr (kEight) return static_cast<int>(eight[m / 4].word[k] >> (8 * (m % 4)) & 255);
    if constexpr (kFour) code = four.word[k] >> (4 * m) & 15;
    if constexpr (kTwo) code = code << 2 | (two.word[k] >> (2 * m) & 3);
    if constexpr (kOne) code = code << 1 | (one.word[k] >> m & 1);
    return static_cast<int>(code);
  }
};

}  // namespace quantrature::cuda
