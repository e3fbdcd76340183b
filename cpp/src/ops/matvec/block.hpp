// What the mat-vec kernels work on at a time.
#pragma once

#include <cstdint>

namespace quantrature {

// Codes that blocks of every plane fill together (packing.hpp).
inline constexpr int64_t kMatvecChunk = 256;

// Some rows of a matrix, and all vectors.
struct MatvecBlock {
  const uint8_t* codes;  // packed
  int64_t row_bytes;
  int64_t rows;
  int64_t cols;
  int bits;
  int64_t group;       // a multiple of 64, or 32, or all columns that the chunks cover and more
  int64_t groups;      // of a row
  const float* scale;  // rows x groups
  const float* zero;   // rows x groups
  int64_t vectors;
  const float* x;        // vectors x cols
  const float* shifted;  // vectors x planes x cols: see in_word_units
  const float* sums;     // vectors x groups: of x over each group
  float* y;              // added to; y[v * y_stride + row]
  int64_t y_stride;
};

// Planes of codes of so many bits.
inline int plane_count(int bits) {
  return bits == 8 ? 1 : (bits >> 2 & 1) + (bits >> 1 & 1) + (bits & 1);
}

// The fast kernel takes eight codes of a plane of p bits out of eight words by one mask, and so finds them
// times a power of two: words are shifted so that the eight vectors of 64 codes begin at bit 0 (with p = 8,
// the four of 32), and vector k is then at bit p k, or, as it needs no mask, is shifted down when it is the
// last of the word. x times this takes that back, and gives the plane its place in the code, shift bits up.
inline float in_word_units(int p, int shift, int64_t column) {
  const int k = static_cast<int>(column / 8 % (p == 8 ? 4 : 8));
  const int bit = p * (k + 1) == 32 ? 0 : p * k;
  return shift >= bit ? static_cast<float>(1 << (shift - bit))
                      : 1.0f / static_cast<float>(1 << (bit - shift));
}

}  // namespace quantrature
