// Where the bits of a code lie in a packed row (quantrature/packing.hpp), for the host and devices.
#pragma once

#include <cstdint>

#include "common/half.hpp"

namespace quantrature::cuda {

// The first bit, in its plane, of code j of a row of cols codes, with p bits a code.
QUANTRATURE_INLINE int64_t first_bit(int64_t j, int p, int64_t cols) {
  const int64_t full = 256 / p;
  const int64_t block = j / full * full;
  const int64_t lane = (j - block) % 8, number = (j - block) / 8;
  const int64_t short_of = (cols - block + 7) / 8;
  const int64_t numbers = short_of < 32 / p ? short_of : 32 / p;
  return p * (block + lane * numbers + number);
}

// The code whose bits begin at field f of a plane, that is at bit p f; cols or more for a field that no code
// has.
QUANTRATURE_INLINE int64_t code_of_field(int64_t f, int p, int64_t cols) {
  const int64_t full = 256 / p;
  const int64_t block = f / full * full;
  const int64_t short_of = (cols - block + 7) / 8;
  const int64_t numbers = short_of < 32 / p ? short_of : 32 / p;
  const int64_t lane = (f - block) / numbers, number = (f - block) % numbers;
  return lane < 8 ? block + number * 8 + lane : cols;
}

QUANTRATURE_INLINE int64_t plane_bytes(int p, int64_t cols) {
  return p * ((cols + 7) / 8);
}

QUANTRATURE_INLINE int64_t packed_row_bytes(int bits, int64_t cols) {
  return bits * ((cols + 7) / 8);
}

// Code j of a packed row.
QUANTRATURE_INLINE int code_at(const uint8_t* row, int bits, int64_t cols, int64_t j) {
  int code = 0, left = bits;
  for (int p = 8; p > 0; p /= 2) {
    if (left < p) continue;
    left -= p;
    const int64_t bit = first_bit(j, p, cols);
    code |= (row[bit / 8] >> (bit % 8) & ((1 << p) - 1)) << left;
    row += plane_bytes(p, cols);
  }
  return code;
}

// Byte b of a packed row, from its codes; code(j) gives them.
template <class Code>
QUANTRATURE_INLINE uint8_t packed_byte(int64_t b, int bits, int64_t cols, const Code& code) {
  int left = bits;
  for (int p = 8; p > 0; p /= 2) {
    if (left < p) continue;
    left -= p;
    if (b >= plane_bytes(p, cols)) {
      b -= plane_bytes(p, cols);
      continue;
    }
    unsigned byte = 0;
    for (int k = 0; k < 8 / p; ++k) {
      const int64_t j = code_of_field(b * (8 / p) + k, p, cols);
      if (j < cols) byte |= (static_cast<unsigned>(code(j)) >> left & ((1u << p) - 1)) << (p * k);
    }
    return static_cast<uint8_t>(byte);
  }
  return 0;
}

}  // namespace quantrature::cuda
