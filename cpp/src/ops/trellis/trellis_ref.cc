#include "runtime/reference.hpp"

namespace quantrature::reference {
namespace {

// The 256 weights of a tile.
void trellis_decode(const uint8_t* stream, const TrellisReader& reader, float factor, float* out) {
  for (int step = 0; step < kTileWeights / reader.per_step; ++step) {
    float raw[2];
    raw_values(reader,
               stream_bits(stream, kTileWeights * reader.bits, step * reader.step_bits, reader.state_bits),
               raw);
    for (int v = 0; v < reader.per_step; ++v) out[step * reader.per_step + v] = raw[v] * factor;
  }
}

void trellis_matvec(const TrellisRow& row, const TrellisReader& reader) {
  const int64_t cols = row.tiles * kTile;
  for (int64_t v = 0; v < row.vectors; ++v) {
    double sums[kTile] = {};
    for (int64_t t = 0; t < row.tiles; ++t) {
      float weights[kTileWeights];
      trellis_decode(row.streams + t * kTileWeights * reader.bits / 8, reader, row.factor, weights);
      for (int i = 0; i < kTileWeights; ++i)
        sums[i / kTile] +=
            static_cast<double>(weights[i]) * static_cast<double>(row.x[v * cols + t * kTile + i % kTile]);
    }
    for (int i = 0; i < kTile; ++i) row.y[v * row.y_stride + i] = static_cast<float>(sums[i]);
  }
}

}  // namespace

void fill_trellis(KernelTable& table) {
  table.trellis_decode = trellis_decode;
  table.trellis_matvec = trellis_matvec;
}

}  // namespace quantrature::reference
