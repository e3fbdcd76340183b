// Products of a packed matrix and a few vectors, and what outliers add to it. Four warps share four rows:
// each takes every fourth run of 1024 columns, a thread 32 codes of a run, which in each plane are the words
// of four lanes. Codes are read once for up to eight vectors. Numeric class B: one order of all sums, the
// same from run to run and for a vector alone or among others.
#include "backend.cuh"
#include "bits.cuh"
#include "device/elements.cuh"
#include "device/planes.cuh"
#include "launch.cuh"
#include "ops/grid/line.hpp"

namespace quantrature::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = 4;
constexpr int kRows = 4;  // of a block
constexpr int64_t kChunk =
    256;  // columns whose codes fill whole blocks of each plane; eight threads read them
constexpr int64_t kRun = 4 * kChunk;
constexpr unsigned kAll = 0xffffffffu;
constexpr int64_t kNarrowCols = 65536;

struct Product {
  qtr_grid_matrix w;
  qtr_csr residuals;
  qtr_matrix x;
  qtr_mutable_matrix y;
  int64_t group, groups;  // of a row
  int64_t whole;          // columns that are read by words
  bool by_four;           // whether vectors may be read four numbers at a time
};

__device__ __forceinline__ float scale_of(const Product& p, int64_t row, int64_t g) {
  return load(p.w.scale.data, p.w.scale.dtype, row * p.groups + g);
}

__device__ __forceinline__ float zero_of(const Product& p, int64_t row, int64_t g, int bits) {
  return p.w.zero.data == nullptr ? symmetric_zero(bits)
                                  : load(p.w.zero.data, p.w.zero.dtype, row * p.groups + g);
}

__device__ __forceinline__ int64_t offset_of(const qtr_csr& m, int64_t row) {
  return m.nnz > INT32_MAX ? static_cast<const int64_t*>(m.row_offsets)[row]
                           : static_cast<const int32_t*>(m.row_offsets)[row];
}

__device__ __forceinline__ int64_t column_of(const qtr_csr& m, int64_t i) {
  return m.cols <= kNarrowCols ? static_cast<const uint16_t*>(m.columns)[i]
                               : static_cast<const int32_t*>(m.columns)[i];
}

// The words that hold codes 64 q + 8 m + 4 h + {0 to 3}, m from 0 to 7, of a chunk; of each plane.
template <int kBits>
struct Words {
  static constexpr bool kEight = kBits == 8;
  static constexpr bool kFour = !kEight && (kBits & 4) != 0, kTwo = !kEight && (kBits & 2) != 0,
                        kOne = !kEight && (kBits & 1) != 0;
  uint4 eight[2], four, two, one;

  __device__ __forceinline__ void read(const uint8_t* row, int64_t cols, int64_t chunk, int q, int h) {
    if constexpr (kEight) {
      const uint4* at = reinterpret_cast<const uint4*>(row + chunk * 256 + q * 64 + h * 16);
      eight[0] = at[0];
      eight[1] = at[2];
    }
    if constexpr (kFour) {
      four = *reinterpret_cast<const uint4*>(row + chunk * 128 + q * 32 + h * 16);
      row += plane_bytes(4, cols);
    }
    if constexpr (kTwo) {
      two = *reinterpret_cast<const uint4*>(row + chunk * 64 + q / 2 * 32 + h * 16);
      row += plane_bytes(2, cols);
    }
    if constexpr (kOne) one = *reinterpret_cast<const uint4*>(row + chunk * 32 + h * 16);
  }

  static __device__ __forceinline__ uint32_t lane(const uint4& words, int k) {
    return k == 0 ? words.x : k == 1 ? words.y : k == 2 ? words.z : words.w;
  }

  // Code number m of lane k of the four.
  __device__ __forceinline__ float code(int q, int m, int k) const {
    if constexpr (kEight) return static_cast<float>(lane(eight[m / 4], k) >> (8 * (m % 4)) & 255u);
    uint32_t c = 0;
    if constexpr (kFour) c |= (lane(four, k) >> (4 * m) & 15u) << (kBits - 4);
    if constexpr (kTwo) c |= (lane(two, k) >> (16 * (q & 1) + 2 * m) & 3u) << (kBits & 1);
    if constexpr (kOne) c |= lane(one, k) >> (8 * q + m) & 1u;
    return static_cast<float>(c);
  }
};

__device__ __forceinline__ Four vector_at(const Product& p, int64_t v, int64_t j) {
  const int64_t at = v * p.x.row_stride + j;
  if (p.by_four) return load4(p.x.data, p.x.dtype, at / 4);
  Four f;
  for (int k = 0; k < 4; ++k) f.v[k] = load(p.x.data, p.x.dtype, at + k);
  return f;
}

template <int kVectors>
__device__ __forceinline__ float add_warp(float x) {
  for (int apart = 16; apart > 0; apart /= 2) x += __shfl_down_sync(kAll, x, static_cast<unsigned>(apart));
  return x;
}

template <int kBits, int kVectors>
__global__ void __launch_bounds__(kThreads) multiply(Product p, int64_t first_vector, int64_t vectors) {
  __shared__ float of_warp[kWarps][kRows][kVectors];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int q = lane % 8 / 2, h = lane % 2;
  const int64_t row_bytes = packed_row_bytes(kBits, p.w.cols);
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kRows; first < p.w.rows;
       first += static_cast<int64_t>(gridDim.x) * kRows) {
    float sum[kRows][kVectors] = {};
    for (int64_t run = warp; run * kRun < p.whole; run += kWarps) {
      const int64_t chunk = run * 4 + lane / 8;
      const int64_t j = chunk * kChunk + q * 64 + h * 4;
      if (chunk * kChunk >= p.whole) continue;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int64_t row = first + r;
        if (row >= p.w.rows) continue;
        Words<kBits> words;
        words.read(p.w.codes + row * row_bytes, p.w.cols, chunk, q, h);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t g = (j + 32 * half) / p.group;
          const float scale = scale_of(p, row, g), zero = zero_of(p, row, g, kBits);
#pragma unroll
          for (int v = 0; v < kVectors; ++v) {
            if (v >= vectors) continue;
            float dot = 0, total = 0;
#pragma unroll
            for (int m = 4 * half; m < 4 * half + 4; ++m) {
              const Four x = vector_at(p, first_vector + v, j + 8 * m);
#pragma unroll
              for (int k = 0; k < 4; ++k) {
                dot = __fmaf_rn(words.code(q, m, k), x.v[k], dot);
                total += x.v[k];
              }
            }
            sum[r][v] = __fmaf_rn(scale, __fmaf_rn(-zero, total, dot), sum[r][v]);
          }
        }
      }
    }
    // Columns past the whole chunks, and outliers: a warp has a row.
    const int64_t own = first + warp;
    float extra[kVectors] = {};
    if (own < p.w.rows) {
      const uint8_t* codes = p.w.codes + own * row_bytes;
      for (int64_t j = p.whole + lane; j < p.w.cols; j += 32) {
        const int64_t g = j / p.group;
        const float value =
            (static_cast<float>(code_at(codes, kBits, p.w.cols, j)) - zero_of(p, own, g, kBits)) *
            scale_of(p, own, g);
        for (int v = 0; v < kVectors && v < vectors; ++v)
          extra[v] =
              __fmaf_rn(value, load(p.x.data, p.x.dtype, (first_vector + v) * p.x.row_stride + j), extra[v]);
      }
      if (p.residuals.row_offsets != nullptr)
        for (int64_t i = offset_of(p.residuals, own) + lane; i < offset_of(p.residuals, own + 1); i += 32) {
          const float value = static_cast<const float*>(p.residuals.values)[i];
          const int64_t j = column_of(p.residuals, i);
          for (int v = 0; v < kVectors && v < vectors; ++v)
            extra[v] = __fmaf_rn(value, load(p.x.data, p.x.dtype, (first_vector + v) * p.x.row_stride + j),
                                 extra[v]);
        }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const float all = add_warp<kVectors>(sum[r][v] + (r == warp ? extra[v] : 0.0f));
        if (lane == 0) of_warp[warp][r][v] = all;
      }
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < kRows * kVectors; i += kThreads) {
      const int r = i / kVectors, v = i % kVectors;
      if (first + r >= p.w.rows || v >= vectors) continue;
      float y = of_warp[0][r][v];
      for (int w = 1; w < kWarps; ++w) y += of_warp[w][r][v];
      store(p.y.data, p.y.dtype, (first_vector + v) * p.y.row_stride + first + r, y);
    }
    __syncthreads();
  }
}

// What an outlier adds to the value of the grid in its place, rounded once.
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
    const float scale = load(a.w.scale.data, a.w.scale.dtype, g);
    const float zero =
        a.w.zero.data == nullptr ? symmetric_zero(a.w.bits) : load(a.w.zero.data, a.w.zero.dtype, g);
    const int code = code_at(a.w.codes + low * row_bytes, a.w.bits, a.w.cols, column);
    a.out[i] = load(a.outliers.values, a.outliers.dtype, i) - (static_cast<float>(code) - zero) * scale;
  }
}

// The first row of a sparse matrix that breaks the rules of check_csr.
__global__ void __launch_bounds__(kThreads) check_rows(qtr_csr m, unsigned long long* first_bad) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; row < m.rows; row += step) {
    const int64_t begin = offset_of(m, row), end = offset_of(m, row + 1);
    bool sound = begin >= 0 && begin <= end && end <= m.nnz && (row > 0 || begin == 0) &&
                 (row < m.rows - 1 || end == m.nnz);
    for (int64_t i = begin; sound && i < end; ++i)
      sound = column_of(m, i) >= 0 && column_of(m, i) < m.cols &&
              (i == begin || column_of(m, i - 1) < column_of(m, i));
    if (!sound) atomicMin(first_bad, static_cast<unsigned long long>(row));
  }
}

int64_t group_length(const qtr_grid_matrix& w) {
  return w.group_size == -1 ? w.cols : std::min(w.group_size, w.cols);
}

}  // namespace

void residuals(const qtr_residuals_args& a) {
  const cudaStream_t stream = stream_of(a.device);
  Scratch<unsigned long long> first_bad(1, stream);
  first_bad.fill_bytes(0xFF, 1);
  launch(check_rows, blocks_for(ceil_div(a.w.rows, kThreads)), kThreads, 0, stream, a.outliers,
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
  Product p{};
  p.w = a.w;
  p.residuals = a.residuals;
  p.x = a.x;
  p.y = a.out;
  p.group = group_length(a.w);
  p.groups = ceil_div(a.w.cols, p.group);
  // Words are read where each plane of each row is aligned to 16 bytes, and 32 neighbours are of one group.
  const bool words =
      a.w.cols % kChunk == 0 && reinterpret_cast<uintptr_t>(a.w.codes) % 16 == 0 && p.group % 32 == 0;
  p.whole = words ? a.w.cols : 0;
  p.by_four = a.x.row_stride % 4 == 0 &&
              reinterpret_cast<uintptr_t>(a.x.data) % static_cast<uintptr_t>(4 * bytes_of(a.x.dtype)) == 0;
  const unsigned blocks = blocks_for(ceil_div(a.w.rows, kRows));
  with_bits(a.w.bits, [&](auto bits) {
    for (int64_t first = 0; first < a.x.rows;) {
      const int64_t left = a.x.rows - first;
      const auto run = [&](auto vectors) {
        const int64_t taken = std::min<int64_t>(left, vectors.value);
        launch(multiply<bits.value, vectors.value>, blocks, kThreads, 0, stream_of(a.device), p, first,
               taken);
        first += taken;
      };
      if (left == 1)
        run(std::integral_constant<int, 1>{});
      else if (left == 2)
        run(std::integral_constant<int, 2>{});
      else if (left <= 4)
        run(std::integral_constant<int, 4>{});
      else
        run(std::integral_constant<int, 8>{});
    }
  });
}

}  // namespace quantrature::cuda
