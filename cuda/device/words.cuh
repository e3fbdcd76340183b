// Codes as floats, out of words of packed rows whose planes are aligned (quantrature/packing.hpp).
#pragma once

#include <bit>

#include "device/planes.cuh"

namespace quantrature::cuda {

// 2^n, for constants.
constexpr float power_of_two(int n) {
  return std::bit_cast<float>(static_cast<uint32_t>(127 + n) << 23);
}

// Adds to `sum` the field of `kPlane` bits that begins at bit `at` of a word, times 2^left, and 2^(23 + left
// - at) of its own: set below the exponent of 2^23, a field is the mantissa of a float. Exact, with what
// field_offset() takes off.
template <int kPlane>
QUANTRATURE_INLINE float add_field(uint32_t word, int at, int left, float sum) {
  if (at + kPlane > 23) {
    word >>= 16;
    at -= 16;
  }
  const uint32_t mask = ((1u << kPlane) - 1) << at;
  return std::fma(std::bit_cast<float>((word & mask) | 0x4B000000u), power_of_two(left - at), sum);
}

template <int kPlane>
QUANTRATURE_INLINE float field_offset(int at, int left) {
  return power_of_two(23 + left - (at + kPlane > 23 ? at - 16 : at));
}

// Some neighbouring lanes of each plane of a chunk of 256 columns, of which the thread has the part that
// begins at column 64 q: code m of lane k is that of column 64 q + 8 m + (first lane) + k.
template <int kBits, int kLanes>
struct LaneWords {
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

  // The same as an integer.
  QUANTRATURE_INLINE int number(int m, int k) const {
    uint32_t code = 0;
    if constexpr (kEight) return static_cast<int>(eight[m / 4].word[k] >> (8 * (m % 4)) & 255);
    if constexpr (kFour) code = four.word[k] >> (4 * m) & 15;
    if constexpr (kTwo) code = code << 2 | (two.word[k] >> (2 * m) & 3);
    if constexpr (kOne) code = code << 1 | (one.word[k] >> m & 1);
    return static_cast<int>(code);
  }

  QUANTRATURE_INLINE float code(int m, int k) const {
    constexpr int kAbove1 = kBits & 1, kAbove2 = kBits & 3;  // bits below the plane of two, and of four
    float sum = 0;
    if constexpr (kEight) {
      sum = -field_offset<8>(8 * (m % 4), 0);
      return add_field<8>(eight[m / 4].word[k], 8 * (m % 4), 0, sum);
    }
    if constexpr (kFour) sum -= field_offset<4>(4 * m, kAbove2);
    if constexpr (kTwo) sum -= field_offset<2>(2 * m, kAbove1);
    if constexpr (kOne) sum -= field_offset<1>(m, 0);
    if constexpr (kFour) sum = add_field<4>(four.word[k], 4 * m, kAbove2, sum);
    if constexpr (kTwo) sum = add_field<2>(two.word[k], 2 * m, kAbove1, sum);
    if constexpr (kOne) sum = add_field<1>(one.word[k], m, 0, sum);
    return sum;
  }
};

template <int kBits>
using FourWords = LaneWords<kBits, 4>;
template <int kBits>
using TwoWords = LaneWords<kBits, 2>;

}  // namespace quantrature::cuda
