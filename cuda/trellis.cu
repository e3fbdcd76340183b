// Trellis codes: weights out of streams (numeric class E), and products of matrices of such streams with a
// few vectors (numeric class B): a thread has one place of every tile of a row of tiles, so that it adds up
// numbers of one row.
#include "backend.cuh"
#include "device/elements.cuh"
#include "launch.cuh"
#include "trellis_reader.cuh"

namespace quantrature::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMost = 4;  // vectors at a time

// A thread for each step.
__global__ void __launch_bounds__(kThreads)
    decode_steps(const uint8_t* streams, int64_t bytes, TrellisReader reader, float factor,
                 qtr_mutable_matrix out) {
  const int64_t steps = out.cols / reader.per_step, step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < out.rows * steps;
       i += step) {
    const int64_t row = i / steps, at = i % steps;
    float raw[2];
    raw_values(
        reader,
        stream_bits(streams + row * bytes, out.cols * reader.bits, at * reader.step_bits, reader.state_bits),
        raw);
    for (int v = 0; v < reader.per_step; ++v)
      store(out.data, out.dtype, row * out.row_stride + at * reader.per_step + v, raw[v] * factor);
  }
}

// A block for each row of tiles.
__global__ void __launch_bounds__(kThreads)
    multiply_streams(const uint8_t* streams, TrellisReader reader, float factor, int64_t tile_rows,
                     int64_t tiles, qtr_matrix x, int64_t first, int vectors, qtr_mutable_matrix out) {
  const int steps = kTileWeights / reader.per_step;  // of a tile; with pairs a block has two tiles at a time
  const int at_once = kThreads / steps, thread = static_cast<int>(threadIdx.x);
  const int own = thread / steps, at = thread % steps;
  const int64_t tile_bytes = kTileWeights * reader.bits / 8;
  __shared__ float of_half_warp[kThreads / 16][kMost];
  for (int64_t r = blockIdx.x; r < tile_rows; r += gridDim.x) {
    float sum[kMost] = {};
    for (int64_t t = own; t < tiles; t += at_once) {
      float raw[2];
      raw_values(reader,
                 stream_bits(streams + (r * tiles + t) * tile_bytes, kTileWeights * reader.bits,
                             int64_t{at} * reader.step_bits, reader.state_bits),
                 raw);
      for (int w = 0; w < reader.per_step; ++w) {
        const float weight = raw[w] * factor;
        const int64_t col = t * kTile + (at * reader.per_step + w) % kTile;
#pragma unroll
        for (int v = 0; v < kMost; ++v)
          if (v < vectors)
            sum[v] = __fmaf_rn(weight, load(x.data, x.dtype, (first + v) * x.row_stride + col), sum[v]);
      }
    }
    // Threads of one row are neighbours: 16 / per_step of them for each of the tiles at a time.
    const int of_row = kTile / reader.per_step;
#pragma unroll
    for (int v = 0; v < kMost; ++v) {
      for (int apart = of_row / 2; apart > 0; apart /= 2)
        sum[v] += __shfl_down_sync(0xffffffffu, sum[v], static_cast<unsigned>(apart), of_row);
      if (own == 0 && thread % of_row == 0) of_half_warp[thread / of_row][v] = sum[v];
    }
    __syncthreads();
    for (int other = 1; other < at_once; ++other) {
      if (own == other && thread % of_row == 0)
        for (int v = 0; v < kMost; ++v) of_half_warp[thread / of_row % 16][v] += sum[v];
      __syncthreads();
    }
    if (thread < kTile)
      for (int v = 0; v < kMost; ++v)
        if (v < vectors)
          static_cast<float*>(out.data)[(first + v) * out.row_stride + r * kTile + thread] =
              of_half_warp[thread][v];
    __syncthreads();
  }
}

}  // namespace

void trellis_dequantize(const qtr_trellis_dequantize_args& a) {
  const cudaStream_t stream = stream_of(a.device);
  const DeviceTrellis reader(a.trellis, stream);
  const int64_t steps = a.out.rows * (a.out.cols / reader.get().per_step);
  launch(decode_steps, blocks_for(ceil_div(steps, kThreads)), kThreads, 0, stream, a.codes,
         ceil_div(a.out.cols * reader.get().bits, 8), reader.get(), reader.factor(a.scale), a.out);
}

void trellis_matvec(const qtr_trellis_matvec_args& a) {
  const cudaStream_t stream = stream_of(a.device);
  const DeviceTrellis reader(a.trellis, stream);
  for (int64_t first = 0; first < a.x.rows; first += kMost)
    launch(multiply_streams, blocks_for(a.rows / kTile), kThreads, 0, stream, a.codes, reader.get(),
           reader.factor(a.scale), a.rows / kTile, a.cols / kTile, a.x, first,
           static_cast<int>(std::min<int64_t>(kMost, a.x.rows - first)), a.out);
}

}  // namespace quantrature::cuda
