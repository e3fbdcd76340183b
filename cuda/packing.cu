// Packed codes. Numeric class E.
#include "backend.cuh"
#include "launch.cuh"
#include "tile.cuh"

namespace quantrature::cuda {
namespace {

constexpr int kThreads = 256;

// A block for each tile. first_bad: the least place of a code that does not fit.
__global__ void __launch_bounds__(kThreads)
    pack_tiles(qtr_pack_args a, int64_t tiles, bool whole, unsigned long long* first_bad) {
  __shared__ uint8_t codes[kTile];
  for (int64_t i = blockIdx.x; i < a.rows * tiles; i += gridDim.x) {
    const int64_t row = i / tiles, begin = i % tiles * kTile;
    const int64_t end = begin + kTile < a.cols ? begin + kTile : a.cols;
    for (int64_t j = begin + threadIdx.x; j < end; j += kThreads) {
      const uint8_t code = a.codes[row * a.row_stride + j];
      codes[j - begin] = code;
      if (code >> a.bits != 0) atomicMin(first_bad, static_cast<unsigned long long>(row * a.cols + j));
    }
    __syncthreads();
    uint8_t* packed = a.packed + row * a.row_bytes;
    const int thread = static_cast<int>(threadIdx.x);
    if (whole)
      pack_whole_tile(codes, begin, end, a.cols, a.bits, thread, kThreads,
                      [&](int64_t at, uint32_t word) { reinterpret_cast<uint32_t*>(packed)[at] = word; });
    else
      pack_tile(codes, begin, end, a.cols, a.bits, thread, kThreads,
                [&](int64_t at, uint8_t byte) { packed[at] = byte; });
    __syncthreads();
  }
}

// Four codes a thread.
__global__ void __launch_bounds__(kThreads) unpack_codes(qtr_unpack_args a, int64_t fours, bool by_four) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < a.rows * fours; i += step) {
    const int64_t row = i / fours, begin = i % fours * 4;
    const uint8_t* packed = a.packed + row * a.row_bytes;
    uint8_t* out = a.codes + row * a.row_stride + begin;
    uint8_t codes[4];
    for (int k = 0; k < 4; ++k)
      codes[k] =
          begin + k < a.cols ? static_cast<uint8_t>(code_at(packed, a.bits, a.cols, begin + k)) : uint8_t{0};
    if (by_four) {
      *reinterpret_cast<uchar4*>(out) = make_uchar4(codes[0], codes[1], codes[2], codes[3]);
    } else {
      for (int k = 0; k < 4; ++k)
        if (begin + k < a.cols) out[k] = codes[k];
    }
  }
}

}  // namespace

void pack(const qtr_pack_args& a) {
  const cudaStream_t stream = stream_of(a.device);
  Scratch<unsigned long long> first_bad(1, stream);
  first_bad.fill_bytes(0xFF, 1);
  const int64_t tiles = ceil_div(a.cols, kTile);
  launch(pack_tiles, blocks_for(a.rows * tiles), kThreads, 0, stream, a, tiles, whole_tiles(a.packed, a.cols),
         first_bad.get());
  unsigned long long at = 0;
  first_bad.read(&at, 1);
  if (at == ~0ull) return;
  const int64_t row = static_cast<int64_t>(at) / a.cols, col = static_cast<int64_t>(at) % a.cols;
  uint8_t code = 0;
  expect(cudaMemcpyAsync(&code, a.codes + row * a.row_stride + col, 1, cudaMemcpyDeviceToHost, stream),
         "reading a code");
  expect(cudaStreamSynchronize(stream), "waiting for the device");
  throw Refused("[pack] codes must fit into bits: got code=" + std::to_string(code) + ", row=" +
                std::to_string(row) + ", col=" + std::to_string(col) + ", bits=" + std::to_string(a.bits));
}

void unpack(const qtr_unpack_args& a) {
  const int64_t fours = ceil_div(a.cols, 4);
  const bool by_four =
      a.cols % 4 == 0 && a.row_stride % 4 == 0 && reinterpret_cast<uintptr_t>(a.codes) % 4 == 0;
  launch(unpack_codes, blocks_for(ceil_div(a.rows * fours, kThreads)), kThreads, 0, stream_of(a.device), a,
         fours, by_four);
}

}  // namespace quantrature::cuda
