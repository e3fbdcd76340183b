// Floats as unsigned integers of the same order, for selection by counting.
#pragma once

#include <bit>
#include <cstdint>

#include "common/half.hpp"

namespace quantrature {

// Larger scores have larger keys; the two zeros have one key, and NaN has the largest.
QUANTRATURE_INLINE uint32_t ordered_key(float score) {
  const uint32_t bits = std::bit_cast<uint32_t>(score + 0.0f);
  const uint32_t key = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return (bits & 0x7FFFFFFFu) > 0x7F800000u ? 0xFFFFFFFFu : key;
}

QUANTRATURE_INLINE float score_of_key(uint32_t key) {
  return std::bit_cast<float>(key & 0x80000000u ? key & 0x7FFFFFFFu : ~key);
}

QUANTRATURE_INLINE float score_of(float x, bool by_abs) {
  return by_abs ? std::bit_cast<float>(std::bit_cast<uint32_t>(x) & 0x7FFFFFFFu) : x;
}

// A digit of those keys whose higher bits are `higher`: (key >> shift) & (2^bits - 1).
struct KeyDigit {
  uint32_t shift;
  uint32_t bits;
  uint32_t higher;

  QUANTRATURE_INLINE bool has(uint32_t key) const {
    return static_cast<uint64_t>(key) >> (shift + bits) == higher;
  }
  QUANTRATURE_INLINE uint32_t of(uint32_t key) const { return key >> shift & ((1u << bits) - 1); }
};

}  // namespace quantrature
