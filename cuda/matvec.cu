// Products of a packed matrix and a few vectors, and what outliers add to it. Numeric class B: one order of
// all sums, the same from run to run.
//
// Codes of a grid are multiplied by tensor cores (matvec_tiles.cu). Codes of a codebook are looked up in
// shared memory, where the tables of a block's rows lie: four warps share four rows; each takes every fourth
// run of 1024 columns, a thread 32 codes of a run, which in each plane are the words of four lanes. Other
// shapes are read code by code.
#include "backend.cuh"
#include "constants.cuh"
#include "device/elements.cuh"
#include "device/words.cuh"
#include "layout/planes.hpp"
#include "product.cuh"

namespace quantrature::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = 4;
constexpr int kRows = 4;          // of a block
constexpr int64_t kChunk = 256;   // columns whose codes fill whole blocks of each plane
constexpr int kMostFew = 4;       // vectors that are read code by code
constexpr int kMostLookedUp = 8;  // vectors of a kernel

// Four numbers of a vector from a column that is a multiple of four.
template <qtr_dtype kDtype>
__device__ __forceinline__ Four vector_at(const Product& p, int64_t v, int64_t j) {
  const int64_t at = v * p.x.row_stride + j;
  if (p.by_four) return load4(p.x.data, kDtype, at / 4);
  Four f;
#pragma unroll
  for (int k = 0; k < 4; ++k) f.v[k] = load(p.x.data, kDtype, at + k);
  return f;
}

template <int kBits, int kVectors, qtr_dtype kDtype>
__global__ void __launch_bounds__(kThreads) multiply_looked_up(Product p, int vectors) {
  __shared__ float of_warp[kWarps][kRows][kVectors], entries[kRows][1 << kBits];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int q = lane % 8 / 2, h = lane % 2;
  const int64_t row_bytes = packed_row_bytes(kBits, p.w.cols);
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kRows; first < p.w.rows;
       first += static_cast<int64_t>(gridDim.x) * kRows) {
    for (int i = static_cast<int>(threadIdx.x); i < kRows << kBits; i += kThreads) {
      const int r = i >> kBits, code = i & ((1 << kBits) - 1);
      entries[r][code] = entry_at(p.table, first + r < p.w.rows ? first + r : p.w.rows - 1, code);
    }
    __syncthreads();
    float sum[kRows][kVectors] = {};
    for (int64_t chunk = warp * 4 + lane / 8; chunk * kChunk < p.whole; chunk += kWarps * 4) {
      const int64_t j = chunk * kChunk + q * 64 + h * 4;
      LaneWords<kBits> words[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {  // a row past the last is the last once more
        const int64_t row = first + r < p.w.rows ? first + r : p.w.rows - 1;
        words[r].read(p.w.codes + row * row_bytes, p.w.cols, chunk, q, h);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float dot[kRows][kVectors] = {};
#pragma unroll
        for (int m = 4 * half; m < 4 * half + 4; ++m) {
          Four x[kVectors];
#pragma unroll
          for (int v = 0; v < kVectors; ++v) x[v] = vector_at<kDtype>(p, v < vectors ? v : 0, j + 8 * m);
#pragma unroll
          for (int r = 0; r < kRows; ++r)
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              const float factor = entries[r][words[r].number(m, k)];
#pragma unroll
              for (int v = 0; v < kVectors; ++v) dot[r][v] = __fmaf_rn(factor, x[v].v[k], dot[r][v]);
            }
        }
        const int64_t g = (j + 32 * half) / p.group;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const int64_t row = first + r < p.w.rows ? first + r : p.w.rows - 1;
          const float scale = scale_at(p.w, row * p.groups + g);
#pragma unroll
          for (int v = 0; v < kVectors; ++v) sum[r][v] = __fmaf_rn(scale, dot[r][v], sum[r][v]);
        }
      }
    }
    float rest[kVectors] = {};
    if (first + warp < p.w.rows) add_rest(p, kBits, first + warp, lane, 0, vectors, rest);
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const float all = add_warp(sum[r][v] + (r == warp ? rest[v] : 0.0f));
        if (lane == 0) of_warp[warp][r][v] = all;
      }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < kRows * kVectors; i += kThreads) {
      const int r = i / kVectors, v = i % kVectors;
      if (first + r >= p.w.rows || v >= vectors) continue;
      float y = of_warp[0][r][v];
      for (int w = 1; w < kWarps; ++w) y += of_warp[w][r][v];
      store(p.y.data, p.y.dtype, v * p.y.row_stride + first + r, y);
    }
    __syncthreads();
  }
}

// A warp for each row.
__global__ void __launch_bounds__(kThreads)
    multiply_one_by_one(Product p, int64_t first_vector, int vectors) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; row < p.w.rows;
       row += step) {
    float sum[kMostFew] = {};
    add_rest(p, p.w.bits, row, lane, first_vector, vectors, sum);
#pragma unroll
    for (int v = 0; v < kMostFew; ++v) {
      const float y = add_warp(sum[v]);
      if (lane == 0 && v < vectors) store(p.y.data, p.y.dtype, (first_vector + v) * p.y.row_stride + row, y);
    }
  }
}

// What an outlier adds to the value in its place, rounded once.
__global__ void __launch_bounds__(kThreads)
    residual_values(qtr_residuals_args a, int64_t group, int64_t groups) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t row_bytes = packed_row_bytes(a.w.bits, a.w.cols);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < a.outliers.nnz; i += step) {
    int64_t low = 0, high = a.w.rows;  // the last row that begins at i or before
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      if (offset_of(a.outliers, middle) <= i)
        low = middle;
      else
        high = middle;
    }
    const int64_t column = column_of(a.outliers, i), g = low * groups + column / group;
    const int code = code_at(a.w.codes + low * row_bytes, a.w.bits, a.w.cols, column);
    a.out[i] = load(a.outliers.values, a.outliers.dtype, i) - value_of(a.w, a.table, a.w.bits, low, g, code);
  }
}

// The first row of a sparse matrix that breaks the rules of check_csr.
__global__ void __launch_bounds__(kThreads) find_faulty_row(qtr_csr m, unsigned long long* first_bad) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; row < m.rows; row += step) {
    if (check_row(m, row).fault != RowFault::none) atomicMin(first_bad, static_cast<unsigned long long>(row));
  }
}

int64_t group_length(const qtr_grid_matrix& w) {
  return w.group_size < 1 ? w.cols : std::min(w.group_size, w.cols);
}

// By the kernel for kVectors vectors, which may be more than there are.
template <int kBits, int kVectors>
void multiply_few(const Product& p, int vectors, cudaStream_t stream) {
  const unsigned blocks = blocks_for(ceil_div(p.w.rows, kRows));
  with_dtype(p.x.dtype, [&](auto dtype) {
    launch(multiply_looked_up<kBits, kVectors, dtype.value>, blocks, kThreads, 0, stream, p, vectors);
  });
}

// Vectors from `first` on.
Product part_of(Product p, int64_t first) {
  p.x.data = static_cast<const char*>(p.x.data) + first * p.x.row_stride * bytes_of(p.x.dtype);
  p.y.data = static_cast<char*>(p.y.data) + first * p.y.row_stride * bytes_of(p.y.dtype);
  return p;
}

template <int kBits>
void multiply_codebook(const Product& p, cudaStream_t stream) {
  for (int64_t first = 0; first < p.x.rows; first += kMostLookedUp) {
    const Product part = part_of(p, first);
    const int taken = static_cast<int>(std::min<int64_t>(kMostLookedUp, p.x.rows - first));
    if (taken == 1)
      multiply_few<kBits, 1>(part, taken, stream);
    else if (taken <= kMostFew)
      multiply_few<kBits, kMostFew>(part, taken, stream);
    else
      multiply_few<kBits, kMostLookedUp>(part, taken, stream);
  }
}

// Columns whose codes are looked up by words: where each plane of each row is aligned to 16 bytes, and 32
// neighbours are of one group.
int64_t columns_looked_up(const qtr_grid_matrix& w, const Product& p) {
  const bool by_words = (w.bits == 2 || w.bits == 3 || w.bits == 4 || w.bits == 8) && w.cols % 128 == 0 &&
                        reinterpret_cast<uintptr_t>(w.codes) % 16 == 0 &&
                        (p.group % 32 == 0 || p.groups == 1);
  return by_words ? w.cols / kChunk * kChunk : 0;
}

}  // namespace

void residuals(const qtr_residuals_args& a) {
  const cudaStream_t stream = stream_of(a.device);
  Scratch<unsigned long long> first_bad(1, stream);
  first_bad.fill_bytes(0xFF, 1);
  launch(find_faulty_row, blocks_for(ceil_div(a.w.rows, kThreads)), kThreads, 0, stream, a.outliers,
         first_bad.get());
  unsigned long long row = 0;
  first_bad.read(&row, 1);
  if (row != ~0ull)
    throw Refused(
        "[csr] row_offsets must rise from 0 to the number of values, columns of a row ascend within the "
        "shape: got "
        "row=" +
        std::to_string(row));
  if (a.outliers.nnz == 0) return;
  const int64_t group = group_length(a.w);
  launch(residual_values, blocks_for(ceil_div(a.outliers.nnz, kThreads)), kThreads, 0, stream, a, group,
         ceil_div(a.w.cols, group));
}

void matvec(const qtr_matvec_args& a) {
  const cudaStream_t stream = stream_of(a.device);
  Product p{};
  p.w = a.w;
  p.table = a.table;
  p.residuals = a.residuals;
  p.x = a.x;
  p.y = a.out;
  p.group = group_length(a.w);
  p.groups = ceil_div(a.w.cols, p.group);
  p.whole = a.table.data != nullptr ? columns_looked_up(a.w, p) : columns_of_tiles(a.w, p.group);
  p.by_four = a.x.row_stride % 4 == 0 &&
              reinterpret_cast<uintptr_t>(a.x.data) % static_cast<uintptr_t>(4 * bytes_of(a.x.dtype)) == 0;
  if (p.whole == 0) {
    for (int64_t first = 0; first < a.x.rows; first += kMostFew)
      launch(multiply_one_by_one, blocks_for(ceil_div(a.w.rows, kWarps)), kThreads, 0, stream, p, first,
             static_cast<int>(std::min<int64_t>(kMostFew, a.x.rows - first)));
    return;
  }
  if (a.table.data == nullptr) return multiply_by_tiles(p, stream);
  with_constant<2, 3, 4, 8>(a.w.bits, [&](auto bits) { multiply_codebook<bits.value>(p, stream); });
}

}  // namespace quantrature::cuda
