// Packed rows, a tile of codes at a time: those in shared memory become bytes of every plane, and back.
#pragma once

#include "launch.cuh"
#include "layout/planes.hpp"

namespace quantrature::cuda {

constexpr int kTile = 2048;  // codes of a tile: whole blocks of each plane

// Calls write(offset of a byte in the row, byte) for all bytes that hold codes [begin, end) of a row. begin
// is a multiple of 256, and end too or it is cols. codes has those of the tile, the first at 0.
template <class Write>
__device__ void pack_tile(const uint8_t* codes, int64_t begin, int64_t end, int64_t cols, int bits,
                          int thread, int threads, const Write& write) {
  const auto code = [&](int64_t j) { return codes[j - begin]; };
  int left = bits;
  int64_t plane = 0;
  for (int p = 8; p > 0; p /= 2) {
    if (left < p) continue;
    left -= p;
    const int64_t from = p * begin / 8, to = end == cols ? plane_bytes(p, cols) : p * end / 8;
    for (int64_t b = from + thread; b < to; b += threads) {
      unsigned byte = 0;
      for (int k = 0; k < 8 / p; ++k) {
        const int64_t j = code_of_field(b * (8 / p) + k, p, cols);
        if (j < cols) byte |= (static_cast<unsigned>(code(j)) >> left & ((1u << p) - 1)) << (p * k);
      }
      write(plane + b, static_cast<uint8_t>(byte));
    }
    plane += plane_bytes(p, cols);
  }
}

// The same by words of four bytes, of a tile of whole blocks in a row where every plane begins at a multiple
// of four.
template <class Write>
__device__ void pack_whole_tile(const uint8_t* codes, int64_t begin, int64_t end, int64_t cols, int bits,
                                int thread, int threads, const Write& write) {
  int left = bits;
  int64_t plane = 0;
  for (int p = 8; p > 0; p /= 2) {
    if (left < p) continue;
    left -= p;
    const int per_word = 32 / p;
    const int words = static_cast<int>((end - begin) / per_word);
    for (int w = thread; w < words; w += threads) {
      const uint8_t* first = codes + w / 8 * 8 * per_word + w % 8;  // lane w % 8 of block w / 8
      uint32_t word = 0;
      for (int k = 0; k < per_word; ++k)
        word |= (static_cast<uint32_t>(first[8 * k]) >> left & ((1u << p) - 1)) << (p * k);
      write((plane + p * begin / 8) / 4 + w, word);
    }
    plane += plane_bytes(p, cols);
  }
}

// Whether pack_whole_tile may be used for all tiles of rows that begin at packed.
inline bool whole_tiles(const uint8_t* packed, int64_t cols) {
  return cols % 256 == 0 && reinterpret_cast<uintptr_t>(packed) % 16 == 0;
}

}  // namespace quantrature::cuda
