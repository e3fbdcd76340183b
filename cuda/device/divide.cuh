// Division by a number that is the same in all threads, by one multiplication: a GPU has no instruction for
// division, and the sequence for one takes about a hundred where numbers have 64 bits.
#pragma once

#include <bit>
#include <cstdint>

#include "common/half.hpp"

namespace quantrature::cuda {

constexpr int64_t kMostDivided = int64_t{1} << 31;  // numbers below it are divided exactly

// With 2^l the power of two from `by` on, multiplier / 2^(31 + l) exceeds 1 / by by less than 1 / (2^31 by).
struct Divider {
  uint32_t by, multiplier;
  int shift;

  explicit Divider(int64_t divisor) : by(static_cast<uint32_t>(divisor)) {
    const int l = std::bit_width(by - 1);
    shift = 31 + l;
    multiplier = static_cast<uint32_t>((uint64_t{1} << shift) / by + 1);
  }
  QUANTRATURE_INLINE uint32_t quotient(uint32_t n) const {
    return static_cast<uint32_t>(static_cast<uint64_t>(n) * multiplier >> shift);
  }
};

}  // namespace quantrature::cuda
