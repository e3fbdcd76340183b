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

constexpr int kTiles = 32;  // whose streams a block has at a time

// The streams of some tiles in shared memory, where words lie as bits follow each other: a stream of bytes
// has its first bit highest.
class Streams {
 public:
  // The words that a thread brings of the next tiles, read ahead.
  static constexpr int kMostWords = kTiles * kMaxTileBytes / 4 / kThreads;

  __device__ Streams(uint32_t* words, int tile_bytes) : words_(words), of_tile_(tile_bytes / 4) {}

  __device__ void read(const uint8_t* from, int64_t tiles, bool whole, int thread) {
#pragma unroll
    for (int i = 0; i < kMostWords; ++i) {
      const int64_t at = i * kThreads + thread;
      next_[i] = at < (tiles < kTiles ? tiles : kTiles) * of_tile_ ? word(from + 4 * at, whole) : 0;
    }
  }
  __device__ void store(int thread) const {
#pragma unroll
    for (int i = 0; i < kMostWords; ++i)
      if (i * kThreads + thread < kTiles * of_tile_) words_[i * kThreads + thread] = next_[i];
  }
  // Bits [begin, begin + n) of the stream of a tile, which begins again after its end; n at most 16.
  __device__ uint32_t bits(int tile, int begin, int n) const {
    const uint32_t* const stream = words_ + tile * of_tile_;
    const int at = begin / 32, after = at + 1 < of_tile_ ? at + 1 : 0;
    const uint64_t both = static_cast<uint64_t>(stream[at]) << 32 | stream[after];
    return static_cast<uint32_t>(both >> (64 - begin % 32 - n)) & ((1u << n) - 1);
  }

 private:
  __device__ static uint32_t word(const uint8_t* from, bool whole) {
    uint32_t bytes = 0;
    if (whole)
      bytes = *reinterpret_cast<const uint32_t*>(from);
    else
      for (int i = 0; i < 4; ++i) bytes |= static_cast<uint32_t>(from[i]) << (8 * i);
    return bytes >> 24 | (bytes >> 8 & 0xFF00u) | (bytes & 0xFF00u) << 8 | bytes << 24;
  }

  uint32_t* words_;
  int of_tile_;
  uint32_t next_[kMostWords];
};

// A block for each row of tiles. whole: words of the streams can be read at once.
__global__ void __launch_bounds__(kThreads)
    multiply_streams(const uint8_t* streams, TrellisReader reader, float factor, int64_t tile_rows,
                     int64_t tiles, qtr_matrix x, int64_t first, int vectors, qtr_mutable_matrix out,
                     bool whole) {
  const int steps = kTileWeights / reader.per_step;  // of a tile; with pairs a block has two tiles at a time
  const int at_once = kThreads / steps, thread = static_cast<int>(threadIdx.x);
  const int own = thread / steps, at = thread % steps;
  const int tile_bytes = kTileWeights * reader.bits / 8;
  __shared__ uint32_t words[kTiles * kMaxTileBytes / 4];
  __shared__ float of_half_warp[kThreads / 16][kMost];
  Streams taken(words, tile_bytes);
  for (int64_t r = blockIdx.x; r < tile_rows; r += gridDim.x) {
    float sum[kMost] = {};
    const uint8_t* const of_row_of_tiles = streams + r * tiles * tile_bytes;
    taken.read(of_row_of_tiles, tiles, whole, thread);
    for (int64_t begin = 0; begin < tiles; begin += kTiles) {
      taken.store(thread);
      __syncthreads();
      const int64_t next = begin + kTiles;
      if (next < tiles) taken.read(of_row_of_tiles + next * tile_bytes, tiles - next, whole, thread);
      const int count = static_cast<int>(tiles - begin < kTiles ? tiles - begin : kTiles);
#pragma unroll 2
      for (int t = own; t < count; t += at_once) {
        float raw[2];
        raw_values(reader, taken.bits(t, at * reader.step_bits, reader.state_bits), raw);
        for (int w = 0; w < reader.per_step; ++w) {
          const float weight = raw[w] * factor;
          const int64_t col = (begin + t) * kTile + (at * reader.per_step + w) % kTile;
#pragma unroll
          for (int v = 0; v < kMost; ++v)
            if (v < vectors)
              sum[v] = __fmaf_rn(weight, load(x.data, x.dtype, (first + v) * x.row_stride + col), sum[v]);
        }
      }
      __syncthreads();
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
           static_cast<int>(std::min<int64_t>(kMost, a.x.rows - first)), a.out,
           reinterpret_cast<uintptr_t>(a.codes) % 4 == 0);
}

}  // namespace quantrature::cuda
