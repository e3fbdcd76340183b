#include "quantrature/trellis.hpp"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "common/check.hpp"
#include "common/float_rows.hpp"
#include "ops/trellis/codes.hpp"
#include "ops/trellis/tile.hpp"
#include "runtime/backend.hpp"
#include "runtime/dispatch.hpp"
#include "runtime/thread_pool.hpp"

namespace quantrature {
namespace {

void check_code(qtr_trellis_code code, const char* op) {
  check(code == QTR_1MAD || code == QTR_3INST || code == QTR_HYB,
        (std::string("[") + op + "] code must be 1mad, 3inst or hyb").c_str(), "code",
        static_cast<int>(code));
}

float factor_of(const TrellisReader& reader, float scale, const char* op) {
  check(std::isfinite(scale), (std::string("[") + op + "] scale must be finite").c_str(), "scale", scale);
  return static_cast<float>(static_cast<double>(scale) / reader.rms);
}

// One row of any length.
void decode(const uint8_t* stream, const TrellisReader& reader, float factor, int64_t weights, float* out) {
  if (weights == kTileWeights) return kernels().trellis_decode(stream, reader, factor, out);
  for (int64_t step = 0; step < weights / reader.per_step; ++step) {
    float raw[2];
    raw_values(reader, stream_bits(stream, weights * reader.bits, step * reader.step_bits, reader.state_bits),
               raw);
    for (int v = 0; v < reader.per_step; ++v) out[step * reader.per_step + v] = raw[v] * factor;
  }
}

}  // namespace

int trellis_step_weights(qtr_trellis_code code) {
  return code == QTR_HYB ? 2 : 1;
}

TrellisReader trellis_reader(const Trellis& trellis, const char* op) {
  const auto rule = [&](const char* text) { return std::string("[") + op + "] " + text; };
  check_code(trellis.code, op);
  check(trellis.bits >= 1 && trellis.bits <= 4, rule("bits must be 1 to 4").c_str(), "bits", trellis.bits);
  TrellisReader reader = reader_of(trellis.code, trellis.bits, trellis.state_bits);
  const int least = std::max(2, reader.step_bits);
  check(trellis.state_bits >= least && trellis.state_bits <= kMaxStateBits,
        rule("state_bits must be at least the bits of a step and at most 16").c_str(), "state_bits",
        trellis.state_bits, "bits of a step", reader.step_bits);
  reader.rms = trellis_rms(reader);
  return reader;
}

int64_t trellis_stream_bytes(const TrellisReader& reader, int64_t weights, const char* op) {
  const auto rule = [&](const char* text) { return std::string("[") + op + "] " + text; };
  check(weights % reader.per_step == 0, rule("columns must be a multiple of the weights of a step").c_str(),
        "cols", weights, "weights of a step", reader.per_step);
  check(weights * reader.bits >= reader.state_bits,
        rule("columns must have at least state_bits bits together").c_str(), "cols", weights, "bits",
        reader.bits, "state_bits", reader.state_bits);
  return (weights * reader.bits + 7) / 8;
}

void trellis_values(const TrellisValuesArgs& a) {
  check_code(a.code, "trellis_values");
  check(a.state_bits >= 2 && a.state_bits <= kMaxStateBits, "[trellis_values] state_bits must be 2 to 16",
        "state_bits", a.state_bits);
  const TrellisReader reader = reader_of(a.code, 1, a.state_bits);
  const int64_t count = int64_t{reader.per_step} << a.state_bits;
  check_given(a.out != nullptr, "trellis_values", "out");
  check(a.out_count == count, "[trellis_values] out must hold the values of all states", "out_count",
        a.out_count, "expected", count);
  for (uint32_t state = 0; state < 1u << a.state_bits; ++state)
    raw_values(reader, state, a.out + static_cast<int64_t>(state) * reader.per_step);
}

void trellis_dequantize(const TrellisDequantizeArgs& a) {
  constexpr const char* op = "trellis_dequantize";
  const TrellisReader reader = trellis_reader(a.trellis, op);
  check_matrix(a.out, op, "out");
  const int64_t bytes = trellis_stream_bytes(reader, a.out.cols, op);
  check_given(a.codes != nullptr, "trellis_dequantize", "codes");
  check(a.codes_size == a.out.rows * bytes, "[trellis_dequantize] codes must hold a stream for each row",
        "codes_size", a.codes_size, "expected", a.out.rows * bytes);
  const float factor = factor_of(reader, a.scale, op);
  if (done_on_device(a, op, &qtr_backend::trellis_dequantize)) return;
  parallel_for_pieces(
      a.out.rows, std::max<int64_t>(1, (1 << 14) / a.out.cols), [&](int64_t first, int64_t last) {
        std::vector<float> buffer(a.out.dtype == QTR_F32 ? 0 : static_cast<size_t>(a.out.cols));
        for (int64_t row = first; row < last; ++row) {
          float* to = float_row_target(a.out, row, 0, buffer.data());
          decode(a.codes + row * bytes, reader, factor, a.out.cols, to);
          store_float_row(a.out, row, 0, a.out.cols, to);
        }
      });
}

void trellis_matvec(const TrellisMatvecArgs& a) {
  constexpr const char* op = "trellis_matvec";
  const TrellisReader reader = trellis_reader(a.trellis, op);
  check(a.rows > 0 && a.cols > 0 && a.rows % kTile == 0 && a.cols % kTile == 0,
        "[trellis_matvec] rows and columns must be multiples of 16", "rows", a.rows, "cols", a.cols);
  check_extent(a.rows, a.cols, op, "the matrix");
  const int64_t tile_bytes = kTileWeights * reader.bits / 8;
  const int64_t expected = a.rows / kTile * (a.cols / kTile) * tile_bytes;
  check_given(a.codes != nullptr, "trellis_matvec", "codes");
  check(a.codes_size == expected, "[trellis_matvec] codes must hold a stream for each tile", "codes_size",
        a.codes_size, "expected", expected);
  check_matrix(a.x, op, "x");
  check_matrix(a.out, op, "out");
  check(a.x.cols == a.cols, "[trellis_matvec] x must have as many numbers as the matrix has columns", "cols",
        a.x.cols, "expected", a.cols);
  check(a.out.rows == a.x.rows && a.out.cols == a.rows && a.out.dtype == QTR_F32,
        "[trellis_matvec] out must be float32, a row for each vector, a column for each row of the matrix",
        "rows", a.out.rows, "cols", a.out.cols, "dtype", static_cast<int>(a.out.dtype));
  const float factor = factor_of(reader, a.scale, op);
  if (done_on_device(a, op, &qtr_backend::trellis_matvec)) return;
  std::vector<float> widened;
  const float* x = static_cast<const float*>(a.x.data);
  if (a.x.dtype != QTR_F32 || (a.x.rows > 1 && a.x.row_stride != a.x.cols)) {
    widened.resize(static_cast<size_t>(a.x.rows * a.x.cols));
    for (int64_t v = 0; v < a.x.rows; ++v) {
      float* to = widened.data() + v * a.x.cols;
      const float* from = float_row(a.x, v, 0, a.x.cols, to);
      if (from != to) std::copy_n(from, a.x.cols, to);
    }
    x = widened.data();
  }
  const int64_t tiles = a.cols / kTile;
  parallel_for_pieces(a.rows / kTile, std::max<int64_t>(1, 64 / tiles), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row)
      kernels().trellis_matvec({a.codes + row * tiles * tile_bytes, tiles, factor, x, a.x.rows,
                                static_cast<float*>(a.out.data) + row * kTile, a.out.row_stride},
                               reader);
  });
}

}  // namespace quantrature
