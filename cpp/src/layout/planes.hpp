// Where the bits of a code lie in a packed row (quantrature/packing.hpp), for the host and devices.
#pragma once

#include <cstdint>

#include "common/host_device.hpp"

namespace quantrature {

// Rows of fewer codes than this are measured in 32 bits, of which a device divides several times as fast.
constexpr int64_t kNarrowRow = int64_t{1} << 28;

// The first bit, in its plane, of code j of a row of cols codes, with p bits a code.
template <class Int>
QUANTRATURE_INLINE Int first_bit(Int j, int p, Int cols) {
  const Int wide = static_cast<Int>(p), full = 256 / wide;
  const Int block = j / full * full;
  const Int lane = (j - block) % 8, number = (j - block) / 8;
  const Int short_of = (cols - block + 7) / 8;
  const Int numbers = short_of < 32 / wide ? short_of : 32 / wide;
  return wide * (block + lane * numbers + number);
}

template <class Int>
QUANTRATURE_INLINE Int code_of_field_as(Int f, int p, Int cols) {
  const Int full = 256 / static_cast<Int>(p);
  const Int block = f / full * full;
  const Int short_of = (cols - block + 7) / 8;
  const Int numbers = short_of < full / 8 ? short_of : full / 8;
  const Int lane = (f - block) / numbers, number = (f - block) % numbers;
  return lane < 8 ? block + number * 8 + lane : cols;
}

// The code whose bits begin at field f of a plane, that is at bit p f; cols or more for a field that no code
// has.
QUANTRATURE_INLINE int64_t code_of_field(int64_t f, int p, int64_t cols) {
  if (cols < kNarrowRow) return code_of_field_as(static_cast<uint32_t>(f), p, static_cast<uint32_t>(cols));
  return code_of_field_as(f, p, cols);
}

QUANTRATURE_INLINE int64_t plane_bytes(int p, int64_t cols) {
  return p * ((cols + 7) / 8);
}

QUANTRATURE_INLINE int64_t packed_row_bytes(int bits, int64_t cols) {
  return bits * ((cols + 7) / 8);
}

template <class Int>
QUANTRATURE_INLINE int code_at_as(const uint8_t* row, int bits, Int cols, Int j) {
  int code = 0, left = bits;
  for (int p = 8; p > 0; p /= 2) {
    if (left < p) continue;
    left -= p;
    const Int bit = first_bit(j, p, cols);
    code |= (row[bit / 8] >> (bit % 8) & ((1 << p) - 1)) << left;
    row += static_cast<Int>(p) * ((cols + 7) / 8);
  }
  return code;
}

// Code j of a packed row.
QUANTRATURE_INLINE int code_at(const uint8_t* row, int bits, int64_t cols, int64_t j) {
  if (cols < kNarrowRow) return code_at_as(row, bits, static_cast<uint32_t>(cols), static_cast<uint32_t>(j));
  return code_at_as(row, bits, cols, j);
}

}  // namespace quantrature
