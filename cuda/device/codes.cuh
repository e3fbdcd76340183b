// Codes between packed rows and bytes, some neighbours at a time, where planes are whole blocks: rows of a
// multiple of 256 codes, aligned to 16 bytes. Four codes are a word, the first in its lowest byte.
#pragma once

#include <cuda_runtime.h>

#include <bit>
#include <cstdint>

#include "layout/planes.hpp"

namespace quantrature::cuda {

// Byte `at` of each word.
__device__ __forceinline__ uint32_t byte_of_each(const uint4& words, uint32_t at) {
  const uint32_t both = at | (at + 4) << 4;
  return __byte_perm(__byte_perm(words.x, words.y, both), __byte_perm(words.z, words.w, both), 0x5410);
}

// Adds the bits of one plane to kCodes codes from column j on, a multiple of kCodes. plane: where it begins
// in the row.
template <int p, int kCodes>
__device__ __forceinline__ void add_plane(const uint8_t* plane, uint32_t j, int left,
                                          uint32_t (&codes)[kCodes / 4]) {
  constexpr uint32_t kMask = 0x01010101u * ((1u << p) - 1);
  const uint32_t number = j % (256 / p) / 8, bit = p * number;
  const uint4* block = reinterpret_cast<const uint4*>(plane + j / (256 / p) * 32);
#pragma unroll
  for (uint32_t half = 0; half < (kCodes == 4 ? 1 : 2); ++half) {
    const uint4 words = block[kCodes == 4 ? j / 4 % 2 : half];
    const uint32_t bytes = byte_of_each(words, bit / 8);
    codes[half] |= (bytes >> bit % 8 & kMask) << left;
    if constexpr (kCodes == 16) {
      const uint32_t next = p == 8 ? byte_of_each(words, bit / 8 + 1) : bytes >> (bit % 8 + p);
      codes[2 + half] |= (next & kMask) << left;
    }
  }
}

// kCodes codes of a row, 4, 8 or 16, from column j on; eighths: cols / 8.
template <int kBits, int kCodes>
__device__ __forceinline__ void read_codes(const uint8_t* row, uint32_t eighths, uint32_t j,
                                           uint32_t (&codes)[kCodes / 4]) {
  constexpr int kAbove1 = kBits & 1, kAbove2 = kBits & 3;  // bits below the plane of two, and of four
  for (uint32_t& four : codes) four = 0;
  if constexpr (kBits == 8) return add_plane<8, kCodes>(row, j, 0, codes);
  if constexpr ((kBits & 4) != 0) {
    add_plane<4, kCodes>(row, j, kAbove2, codes);
    row += 4 * eighths;
  }
  if constexpr ((kBits & 2) != 0) {
    add_plane<2, kCodes>(row, j, kAbove1, codes);
    row += 2 * eighths;
  }
  if constexpr ((kBits & 1) != 0) add_plane<1, kCodes>(row, j, 0, codes);
}

// Code k of four as a float: set below the exponent of 2^23, it is the mantissa.
__device__ __forceinline__ float code_as_float(uint32_t four, uint32_t k) {
  return std::bit_cast<float>(__byte_perm(four, 0x4B000000u, 0x7440u | k)) - 8388608.0f;
}

// The codes of a warp on their way into planes, in shared memory. Eight bytes after each 64 keep threads that
// read blocks side by side on different banks.
constexpr int kWarpCodes = 512;
struct alignas(16) WarpCodes {
  uint32_t words[(kWarpCodes + kWarpCodes / 8) / 4];

  QUANTRATURE_INLINE static int place(int four) {
    return four + four / 16 * 2;
  }  // of codes 4 four to 4 four + 3
};

// One plane of n codes, 256 or 512, whose bits are those from `left` on. Four words of a block are made at a
// time: byte m of each comes from 8 / p words of codes, and then bytes are transposed.
template <int p>
__device__ __forceinline__ void write_plane(const WarpCodes& codes, int n, int left, int lane,
                                            uint8_t* plane) {
  constexpr uint32_t kMask = 0x01010101u * ((1u << p) - 1);
  for (int t = lane; t < n * p / 128; t += 32) {
    // 64 / p words of codes are a block, of which this thread has every other one; 16 begin after a gap.
    const uint32_t* first = codes.words + WarpCodes::place(t / 2 * (64 / p)) + t % 2;
    uint32_t bytes[4];
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      bytes[m] = 0;
#pragma unroll
      for (int k = 0; k < 8 / p; ++k)
        bytes[m] |= (first[WarpCodes::place(2 * (8 / p * m + k))] >> left & kMask) << (p * k);
    }
    const uint32_t a = __byte_perm(bytes[0], bytes[1], 0x5140), b = __byte_perm(bytes[2], bytes[3], 0x5140);
    const uint32_t c = __byte_perm(bytes[0], bytes[1], 0x7362), d = __byte_perm(bytes[2], bytes[3], 0x7362);
    reinterpret_cast<uint4*>(plane)[t] = make_uint4(__byte_perm(a, b, 0x5410), __byte_perm(a, b, 0x7632),
                                                    __byte_perm(c, d, 0x5410), __byte_perm(c, d, 0x7632));
  }
}

// All planes of n codes of a row, from column j on, a multiple of 256. For a warp, with its codes in place.
__device__ __forceinline__ void write_codes(const WarpCodes& codes, int n, int bits, int lane, uint8_t* row,
                                            uint32_t eighths, uint32_t j) {
  if (bits == 8) return write_plane<8>(codes, n, 0, lane, row + j);
  if (bits & 4) {
    write_plane<4>(codes, n, bits & 3, lane, row + j / 2);
    row += 4 * eighths;
  }
  if (bits & 2) {
    write_plane<2>(codes, n, bits & 1, lane, row + j / 4);
    row += 2 * eighths;
  }
  if (bits & 1) write_plane<1>(codes, n, 0, lane, row + j / 8);
}

}  // namespace quantrature::cuda
