// Packed codes. Numeric class E. Rows of whole blocks are read and written 16 bytes at a time; others, code
// by code.
#include "backend.cuh"
#include "constants.cuh"
#include "device/codes.cuh"
#include "device/divide.cuh"
#include "launch.cuh"
#include "tile.cuh"

namespace quantrature::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// A warp for each 512 codes of a row of whole blocks, 16 codes a thread.
__global__ void __launch_bounds__(kThreads)
    pack_blocks(qtr_pack_args a, uint32_t pieces, Divider per_row, unsigned long long* first_bad) {
  __shared__ WarpCodes of_warp[kWarps];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  WarpCodes& codes = of_warp[warp];
  const uint32_t piece = blockIdx.x * kWarps + static_cast<uint32_t>(warp);
  if (piece >= pieces) return;
  const uint32_t row = per_row.quotient(piece), cols = static_cast<uint32_t>(a.cols);
  const uint32_t begin = (piece - row * per_row.by) * kWarpCodes,
                 j = begin + static_cast<uint32_t>(lane) * 16;
  const int n = static_cast<int>(cols - begin < kWarpCodes ? cols - begin : kWarpCodes);
  if (j < cols) {
    const uint4 own = *reinterpret_cast<const uint4*>(a.codes + row * a.row_stride + j);
    const uint32_t words[4] = {own.x, own.y, own.z, own.w};
    const uint32_t above = 0x01010101u * (0xFFu << a.bits & 0xFFu);
    if (((own.x | own.y | own.z | own.w) & above) != 0)
      for (uint32_t k = 0; k < 16; ++k)
        if ((words[k / 4] >> (8 * (k % 4)) & 0xFFu) >> a.bits != 0)
          atomicMin(first_bad, static_cast<unsigned long long>(row * a.cols + j + k));
    for (int k = 0; k < 4; k += 2)
      *reinterpret_cast<uint2*>(&codes.words[WarpCodes::place(4 * lane + k)]) =
          make_uint2(words[k], words[k + 1]);
  }
  __syncwarp();
  write_codes(codes, n, a.bits, lane, a.packed + row * a.row_bytes, cols / 8, begin);
}

// Sixteen codes of each of two rows a thread, of rows of whole blocks. What there is no second row for reads
// the first again.
constexpr int64_t kRowsOfThread = 2;
template <int kBits>
__global__ void __launch_bounds__(kThreads)
    unpack_blocks(qtr_unpack_args a, uint32_t count, Divider per_row) {
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= count) return;
  const uint32_t of_rows = per_row.quotient(i), j = (i - of_rows * per_row.by) * 16;
  const int64_t first = of_rows * kRowsOfThread;
  uint32_t codes[kRowsOfThread][4];
#pragma unroll
  for (int r = 0; r < kRowsOfThread; ++r) {
    const int64_t row = first + r < a.rows ? first + r : first;
    read_codes<kBits, 16>(a.packed + row * a.row_bytes, per_row.by * 2, j, codes[r]);
  }
#pragma unroll
  for (int r = 0; r < kRowsOfThread; ++r)
    if (first + r < a.rows)
      *reinterpret_cast<uint4*>(a.codes + (first + r) * a.row_stride + j) =
          make_uint4(codes[r][0], codes[r][1], codes[r][2], codes[r][3]);
}

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

// Four codes a thread; a block has a part of a row, or of some rows one after the other.
__global__ void __launch_bounds__(kThreads) unpack_codes(qtr_unpack_args a, bool by_four) {
  for (int64_t row = blockIdx.y; row < a.rows; row += gridDim.y)
    for (int64_t begin = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * 4; begin < a.cols;
         begin += static_cast<int64_t>(gridDim.x) * kThreads * 4) {
      const uint8_t* packed = a.packed + row * a.row_bytes;
      uint8_t* out = a.codes + row * a.row_stride + begin;
      uint8_t codes[4];
      for (int k = 0; k < 4; ++k)
        codes[k] = begin + k < a.cols ? static_cast<uint8_t>(code_at(packed, a.bits, a.cols, begin + k))
                                      : uint8_t{0};
      if (by_four) {
        *reinterpret_cast<uchar4*>(out) = make_uchar4(codes[0], codes[1], codes[2], codes[3]);
      } else {
        for (int k = 0; k < 4; ++k)
          if (begin + k < a.cols) out[k] = codes[k];
      }
    }
}

// Whether codes and planes may be read and written 16 bytes at a time.
template <class Args>
bool by_sixteen(const Args& a) {
  return whole_tiles(a.packed, a.cols) && a.cols < kMostDivided && a.row_stride % 16 == 0 &&
         reinterpret_cast<uintptr_t>(a.codes) % 16 == 0;
}

}  // namespace

void pack(const qtr_pack_args& a) {
  const cudaStream_t stream = stream_of(a.device);
  Scratch<unsigned long long> first_bad(1, stream);
  first_bad.fill_bytes(0xFF, 1);
  const int64_t tiles = ceil_div(a.cols, kTile), per_row = ceil_div(a.cols, kWarpCodes);
  if (by_sixteen(a) && a.rows * per_row < kMostDivided)
    launch(pack_blocks, static_cast<unsigned>(ceil_div(a.rows * per_row, kWarps)), kThreads, 0, stream, a,
           static_cast<uint32_t>(a.rows * per_row), Divider(per_row), first_bad.get());
  else
    launch(pack_tiles, blocks_for(a.rows * tiles), kThreads, 0, stream, a, tiles,
           whole_tiles(a.packed, a.cols), first_bad.get());
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
  const int64_t count = ceil_div(a.rows, kRowsOfThread) * (a.cols / 16);
  if (by_sixteen(a) && count < kMostDivided)
    return with_bits(a.bits, [&](auto bits) {
      launch(unpack_blocks<bits.value>, static_cast<unsigned>(ceil_div(count, kThreads)), kThreads, 0,
             stream_of(a.device), a, static_cast<uint32_t>(count), Divider(a.cols / 16));
    });
  const bool by_four =
      a.cols % 4 == 0 && a.row_stride % 4 == 0 && reinterpret_cast<uintptr_t>(a.codes) % 4 == 0;
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(ceil_div(a.cols, 4 * kThreads), 1 << 16)),
                  static_cast<unsigned>(std::min<int64_t>(a.rows, 1 << 15)));
  launch(unpack_codes, grid, kThreads, 0, stream_of(a.device), a, by_four);
}

}  // namespace quantrature::cuda
