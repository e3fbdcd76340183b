// What the mat-vec kernels work on at a time.
#pragma once

#include <cstdint>

namespace quantrature {

// Codes that blocks of every plane fill together (packing.hpp).
inline constexpr int64_t kMatvecChunk = 256;

// Codes of a unit: the smallest group but one.
inline constexpr int64_t kMatvecUnit = 64;

// Vectors that a kernel multiplies at the most, and that read each code once.
inline constexpr int64_t kMatvecTile = 16;

// Columns whose numbers of x share a scale where x is rounded to integers.
inline constexpr int64_t kMatvecRun = 64;

// Bits of a code whose table matvec_tables takes.
inline constexpr int kMostTableBits = 4;

// Runs without a larger number are rounded to zero: 127 / x must be finite.
inline constexpr float kSmallestRounded = 0x1p-120f;

// Some rows of a matrix, and all vectors of a tile.
struct MatvecBlock {
  const uint8_t* codes;  // packed
  int64_t row_bytes;
  int64_t rows;
  int64_t cols;
  int bits;
  int64_t
      group;  // a multiple of 64 (with tables, of 32), or 32, or all columns that the chunks cover and more
  int64_t groups;      // of a row
  const float* scale;  // rows x groups
  const float* zero;   // rows x groups
  int64_t vectors;
  const float* x;  // x[v * x_stride + column]
  int64_t x_stride;
  const float* shifted;  // vectors x planes x cols: see in_word_units
  const float* sums;     // vectors x groups: of x over each group
  float* y;              // y[v * y_stride + row]
  int64_t y_stride;
};

// Where the scales of a chunk are, for the kernel that multiplies bytes: its sums of integers have 16 lanes,
// two for every 32 columns.
struct MatvecLanes {
  int32_t group[16];  // of a lane, counted from the first
  int64_t first;
  int64_t count;  // at most 8
};

// The same as integers of 8 bits. The value of a number of x is limbs[0] 256^(limbs-1) + ... +
// limbs[limbs-1], times x_scale.
struct MatvecBytes {
  MatvecBlock block;         // but for group, x and shifted
  const MatvecLanes* lanes;  // chunks
  int limbs;                 // 1 or 3
  const int8_t* x;           // chunks x vectors x limbs x 256, in the order of byte_place
  const float* x_scale;      // chunks x vectors x 16: of the lanes
};

// Codes of a codebook.
struct MatvecTables {
  MatvecBlock block;   // but for zero, shifted and sums; scale is null where there are none
  const float* table;  // of row r: table + r * table_stride
  int64_t table_stride;
};

// Where column j of a chunk stands among the 256 bytes of x.
inline int64_t byte_place(int64_t j) {
  return j % 32 / 8 * 64 + j / 32 * 8 + j % 8;
}

// Whether the codes of a unit lie together: then the last chunk may have as few units as one.
inline constexpr bool has_units(int bits) {
  return bits == 4 || bits == 8;
}

// Columns that the kernels for grids take, in chunks and, where they can, units; the others are unpacked
// first.
inline int64_t blocked_columns(int64_t cols, int bits) {
  const int64_t piece = has_units(bits) ? kMatvecUnit : kMatvecChunk;
  return cols / piece * piece;
}

// Planes of codes of so many bits.
inline int plane_count(int bits) {
  return bits == 8 ? 1 : (bits >> 2 & 1) + (bits >> 1 & 1) + (bits & 1);
}

// The fast kernel for floats takes eight codes of a plane of p bits out of eight words by one mask, and so
// finds them times a power of two: words are shifted so that the eight vectors of 64 codes begin at bit 0
// (with p = 8, the four of 32), and vector k is then at bit p k, or, as it needs no mask, is shifted down
// when it is the last of the word. x times this takes that back, and gives the plane its place in the code,
// shift bits up.
inline float in_word_units(int p, int shift, int64_t column) {
  const int k = static_cast<int>(column / 8 % (p == 8 ? 4 : 8));
  const int bit = p * (k + 1) == 32 ? 0 : p * k;
  return shift >= bit ? static_cast<float>(1 << (shift - bit))
                      : 1.0f / static_cast<float>(1 << (bit - shift));
}

}  // namespace quantrature
