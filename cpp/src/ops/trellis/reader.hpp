// How the streams of a checked trellis are read. Shared by the reference, the fast kernels and the search.
#pragma once

#include <cstdint>

#include "common/half.hpp"
#include "quantrature/trellis.hpp"

namespace quantrature {

inline constexpr int kTile = 16;  // rows and columns of a tile
inline constexpr int kTileWeights = kTile * kTile;
inline constexpr int kMaxTileBytes = kTileWeights * 4 / 8;
inline constexpr int kHybEntries = 512;

struct TrellisReader {
  qtr_trellis_code code;
  int bits;
  int state_bits;
  int per_step;               // weights
  int step_bits;              // bits * per_step
  double rms;                 // of the raw values
  const uint32_t* hyb_pairs;  // two float16, the first in the low half
};

QUANTRATURE_INLINE int one_mad(uint32_t state) {
  const uint32_t u = 34038481u * state + 76625530u;
  const uint32_t pairs = (u & 0x00FF00FFu) + (u >> 8 & 0x00FF00FFu);
  return static_cast<int>((pairs + (pairs >> 16)) & 0xFFFFu) - 510;
}

// The two halves to add.
QUANTRATURE_INLINE uint32_t three_inst(uint32_t state) {
  return ((89226354u * state + 64248484u) & 0x8FFF8FFFu) ^ 0x3B603B60u;
}

QUANTRATURE_INLINE uint32_t hyb(uint32_t state, const uint32_t* pairs) {
  const uint32_t h = state * (state + 1);
  return pairs[h >> 6 & 511u] ^ (h & 0x8000u) << 16;
}

// Bits [begin, begin + n) of a stream that begins again after `total`, n at most 16.
QUANTRATURE_INLINE uint32_t stream_bits(const uint8_t* stream, int64_t total, int64_t begin, int n) {
  uint32_t bits = 0;
  for (int i = 0; i < n; ++i) {
    const int64_t at = begin + i < total ? begin + i : begin + i - total;
    bits = bits << 1 | (stream[at / 8] >> (7 - at % 8) & 1u);
  }
  return bits;
}

// raw of a state; writes per_step numbers.
QUANTRATURE_INLINE void raw_values(const TrellisReader& reader, uint32_t state, float* out) {
  if (reader.code == QTR_1MAD) {
    out[0] = static_cast<float>(one_mad(state));
  } else if (reader.code == QTR_3INST) {
    const uint32_t u = three_inst(state);
    const float sum = f32_from_f16(static_cast<uint16_t>(u)) + f32_from_f16(static_cast<uint16_t>(u >> 16));
    out[0] = f32_from_f16(f16_from_f32(sum));
  } else {
    const uint32_t u = hyb(state, reader.hyb_pairs);
    out[0] = f32_from_f16(static_cast<uint16_t>(u));
    out[1] = f32_from_f16(static_cast<uint16_t>(u >> 16));
  }
}

// The reader of a trellis; throws InvalidArgument, with op in the message, if there is no such trellis.
TrellisReader trellis_reader(const Trellis& trellis, const char* op);

// Bytes of the stream of so many weights; throws InvalidArgument if they do not fill the steps and the
// window.
int64_t trellis_stream_bytes(const TrellisReader& reader, int64_t weights, const char* op);

}  // namespace quantrature
