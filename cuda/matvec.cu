// Products of a packed matrix and a few vectors, and what outliers add to it. Numeric class B: one order of
// all sums, the same from run to run.
//
// Up to four vectors: four warps share four rows; each takes every fourth run of 1024 columns, a thread 32
// codes of a run, which in each plane are the words of four lanes. A code becomes a float by two operations
// for each plane. More vectors: tensor cores multiply codes, which bfloat16 holds exactly, and vectors, which
// are one, two or three bfloat16 apart (bfloat16, float16, float32); products and sums are of float32, and
// scales and zeros come in after each 32 columns, so that nothing is rounded that is not rounded without
// them. Codes of a codebook are looked up in shared memory, where the tables of a block's rows lie; the
// kernel for few vectors takes up to eight of them. Codes of 1, 5, 6 and 7 bits, and rows whose planes do not
// begin at words, are read one by one.
#include "backend.cuh"
#include "device/elements.cuh"
#include "device/planes.cuh"
#include "device/words.cuh"
#include "launch.cuh"
#include "mma.cuh"
#include "ops/grid/line.hpp"

namespace quantrature::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = 4;
constexpr int kRows = 4;          // of a block
constexpr int64_t kChunk = 256;   // columns whose codes fill whole blocks of each plane
constexpr int kMostFew = 4;       // vectors without tensor cores
constexpr int kMostLookedUp = 8;  // the same, of a codebook
constexpr int kMostTiles = 2;     // of eight vectors, of a kernel
constexpr int64_t kNarrowCols = 65536;

__device__ __forceinline__ float add_warp(float x) {
  for (int apart = 16; apart > 0; apart /= 2)
    x += __shfl_down_sync(0xffffffffu, x, static_cast<unsigned>(apart));
  return x;
}

struct Product {
  qtr_grid_matrix w;
  qtr_matrix table;  // data null: a grid
  qtr_csr residuals;
  qtr_matrix x;
  qtr_mutable_matrix y;
  int64_t group, groups;  // of a row
  int64_t whole;          // columns that are read by words
  bool by_four;           // whether vectors may be read four numbers at a time
};

__device__ __forceinline__ int64_t offset_of(const qtr_csr& m, int64_t row) {
  return m.nnz > INT32_MAX ? static_cast<const int64_t*>(m.row_offsets)[row]
                           : static_cast<const int32_t*>(m.row_offsets)[row];
}

__device__ __forceinline__ int64_t column_of(const qtr_csr& m, int64_t i) {
  return m.cols <= kNarrowCols ? static_cast<const uint16_t*>(m.columns)[i]
                               : static_cast<const int32_t*>(m.columns)[i];
}

// Group g of all rows.
__device__ __forceinline__ float zero_at(const qtr_grid_matrix& w, int64_t g, int bits) {
  return w.zero.data == nullptr ? symmetric_zero(bits) : load(w.zero.data, w.zero.dtype, g);
}

__device__ __forceinline__ float scale_at(const qtr_grid_matrix& w, int64_t g) {
  return w.scale.data == nullptr ? 1.0f : load(w.scale.data, w.scale.dtype, g);
}

__device__ __forceinline__ float entry_at(const qtr_matrix& table, int64_t row, int code) {
  return load(table.data, table.dtype, (table.rows > 1 ? row * table.row_stride : 0) + code);
}

// What a code stands for.
__device__ __forceinline__ float value_of(const qtr_grid_matrix& w, const qtr_matrix& table, int bits,
                                          int64_t row, int64_t g, int code) {
  if (table.data != nullptr) return entry_at(table, row, code) * scale_at(w, g);
  return (static_cast<float>(code) - zero_at(w, g, bits)) * scale_at(w, g);
}

// What columns past the whole chunks, and outliers, add to a row; the threads of a warp share it.
template <int kVectors>
__device__ void add_rest(const Product& p, int bits, int64_t row, int lane, int64_t first_vector, int vectors,
                         float (&sum)[kVectors]) {
  const uint8_t* codes = p.w.codes + row * packed_row_bytes(bits, p.w.cols);
  const auto add = [&](float value, int64_t j) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
      if (v < vectors)
        sum[v] = __fmaf_rn(value, load(p.x.data, p.x.dtype, (first_vector + v) * p.x.row_stride + j), sum[v]);
  };
  for (int64_t j = p.whole + lane; j < p.w.cols; j += 32) {
    const int64_t g = row * p.groups + j / p.group;
    add(value_of(p.w, p.table, bits, row, g, code_at(codes, bits, p.w.cols, j)), j);
  }
  if (p.residuals.row_offsets == nullptr) return;
  for (int64_t i = offset_of(p.residuals, row) + lane; i < offset_of(p.residuals, row + 1); i += 32)
    add(static_cast<const float*>(p.residuals.values)[i], column_of(p.residuals, i));
}

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

// kEntries: codes are of a codebook.
template <int kBits, int kVectors, qtr_dtype kDtype, bool kEntries>
__global__ void __launch_bounds__(kThreads) multiply(Product p, int vectors) {
  __shared__ float of_warp[kWarps][kRows][kVectors], entries[kRows][kEntries ? 1 << kBits : 1];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int q = lane % 8 / 2, h = lane % 2;
  const int64_t row_bytes = packed_row_bytes(kBits, p.w.cols);
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kRows; first < p.w.rows;
       first += static_cast<int64_t>(gridDim.x) * kRows) {
    if constexpr (kEntries) {
      for (int i = static_cast<int>(threadIdx.x); i < kRows << kBits; i += kThreads) {
        const int r = i >> kBits, code = i & ((1 << kBits) - 1);
        entries[r][code] = entry_at(p.table, first + r < p.w.rows ? first + r : p.w.rows - 1, code);
      }
      __syncthreads();
    }
    float sum[kRows][kVectors] = {};
    for (int64_t chunk = warp * 4 + lane / 8; chunk * kChunk < p.whole; chunk += kWarps * 4) {
      const int64_t j = chunk * kChunk + q * 64 + h * 4;
      FourWords<kBits> words[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {  // a row past the last is the last once more
        const int64_t row = first + r < p.w.rows ? first + r : p.w.rows - 1;
        words[r].read(p.w.codes + row * row_bytes, p.w.cols, chunk, q, h);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float dot[kRows][kVectors] = {}, total[kVectors] = {};
#pragma unroll
        for (int m = 4 * half; m < 4 * half + 4; ++m) {
          Four x[kVectors];
#pragma unroll
          for (int v = 0; v < kVectors; ++v) {
            x[v] = vector_at<kDtype>(p, v < vectors ? v : 0, j + 8 * m);
            total[v] += (x[v].v[0] + x[v].v[1]) + (x[v].v[2] + x[v].v[3]);
          }
#pragma unroll
          for (int r = 0; r < kRows; ++r)
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              float factor;
              if constexpr (kEntries)
                factor = entries[r][words[r].number(m, k)];
              else
                factor = words[r].code(m, k);
#pragma unroll
              for (int v = 0; v < kVectors; ++v) dot[r][v] = __fmaf_rn(factor, x[v].v[k], dot[r][v]);
            }
        }
        const int64_t g = (j + 32 * half) / p.group;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const int64_t row = first + r < p.w.rows ? first + r : p.w.rows - 1, at = row * p.groups + g;
          const float scale = scale_at(p.w, at), zero = kEntries ? 0.0f : zero_at(p.w, at, kBits);
#pragma unroll
          for (int v = 0; v < kVectors; ++v)
            sum[r][v] =
                __fmaf_rn(scale, kEntries ? dot[r][v] : __fmaf_rn(-zero, total[v], dot[r][v]), sum[r][v]);
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

// Vectors as sums of bfloat16, limb after limb, and the sum of each 32 columns; a warp for those. Rows of
// kTile vectors, of which the last ones may be zeros.
struct Limbs {
  uint16_t* numbers;  // (limb, vector, column)
  float* sums;        // (vector, column / 32)
  int64_t vectors, cols;
};

__global__ void __launch_bounds__(kThreads) split_vectors(qtr_matrix x, Limbs to, int limbs) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t parts = to.cols / 32, step = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; i < to.vectors * parts;
       i += step) {
    const int64_t v = i / parts, j = i % parts * 32 + lane;
    const float value = v < x.rows ? load(x.data, x.dtype, v * x.row_stride + j) : 0.0f;
    float rest = value;
    for (int limb = 0; limb < limbs; ++limb) {
      const uint16_t bits = bf16_from_f32(rest);
      to.numbers[(limb * to.vectors + v) * to.cols + j] = bits;
      rest -= f32_from_bf16(bits);
    }
    const float sum = add_warp(value);
    if (lane == 0) to.sums[i] = sum;
  }
}

// A warp has 16 rows and every fourth chunk, 8 kTiles vectors.
template <int kBits, int kTiles, int kLimbs>
__global__ void __launch_bounds__(kThreads)
    multiply_tiles(Product p, Limbs x, int64_t first_vector, int vectors) {
  constexpr int kMany = 8 * kTiles;
  __shared__ float of_warp[kWarps][16][kMany];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int g = lane / 4,
            t = lane % 4;  // a thread has rows g and g + 8, and vectors 2 t and 2 t + 1 of each tile
  const int64_t row_bytes = packed_row_bytes(kBits, p.w.cols), parts = x.cols / 32;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * 16; first < p.w.rows;
       first += static_cast<int64_t>(gridDim.x) * 16) {
    const int64_t last = p.w.rows - 1;
    const int64_t rows[2] = {first + g < last ? first + g : last,
                             first + g + 8 < last ? first + g + 8 : last};
    float sum[kTiles][4] = {};
    for (int64_t chunk = warp; chunk * kChunk < p.whole; chunk += kWarps) {
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        TwoWords<kBits> words[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) words[r].read(p.w.codes + rows[r] * row_bytes, p.w.cols, chunk, q, t);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int64_t j = chunk * kChunk + q * 64 + half * 32;
          float dot[kTiles][4] = {};
#pragma unroll
          for (int m = 4 * half; m < 4 * half + 4; m += 2) {
            uint32_t a[4];
#pragma unroll
            for (int i = 0; i < 4; ++i)
              a[i] = two_bf16(words[i % 2].code(m + i / 2, 0), words[i % 2].code(m + i / 2, 1));
            const int64_t at = chunk * kChunk + q * 64 + 8 * m + 2 * t;
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
              for (int limb = 0; limb < kLimbs; ++limb) {
                const uint16_t* from =
                    x.numbers + (limb * x.vectors + first_vector + 8 * tile + g) * x.cols + at;
                const uint32_t b[2] = {*reinterpret_cast<const uint32_t*>(from),
                                       *reinterpret_cast<const uint32_t*>(from + 8)};
                multiply_add(dot[tile], a, b);
              }
          }
          float scale[2], zero[2];
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const int64_t group = rows[r] * p.groups + j / p.group;
            scale[r] = scale_at(p.w, group);
            zero[r] = zero_at(p.w, group, kBits);
          }
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const float total = x.sums[(first_vector + 8 * tile + 2 * t + i % 2) * parts + j / 32];
              sum[tile][i] =
                  __fmaf_rn(scale[i / 2], __fmaf_rn(-zero[i / 2], total, dot[tile][i]), sum[tile][i]);
            }
        }
      }
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int i = 0; i < 4; ++i) of_warp[warp][g + i / 2 * 8][8 * tile + 2 * t + i % 2] = sum[tile][i];
    __syncthreads();
    for (int r = warp; r < 16 && first + r < p.w.rows; r += kWarps) {
      float rest[kMany] = {};
      add_rest(p, kBits, first + r, lane, first_vector, vectors, rest);
#pragma unroll
      for (int v = 0; v < kMany; ++v) {
        float y = add_warp(rest[v]);
        if (lane != 0 || v >= vectors) continue;
        for (int w = 0; w < kWarps; ++w) y += of_warp[w][r][v];
        store(p.y.data, p.y.dtype, (first_vector + v) * p.y.row_stride + first + r, y);
      }
    }
    __syncthreads();
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
  return w.group_size < 1 ? w.cols : std::min(w.group_size, w.cols);
}

// By the kernel for kVectors vectors, which may be more than there are.
template <int kBits, int kVectors, bool kEntries = false>
void multiply_few(const Product& p, int vectors, cudaStream_t stream) {
  const unsigned blocks = blocks_for(ceil_div(p.w.rows, kRows));
  switch (p.x.dtype) {
    case QTR_F32:
      return launch(multiply<kBits, kVectors, QTR_F32, kEntries>, blocks, kThreads, 0, stream, p, vectors);
    case QTR_F16:
      return launch(multiply<kBits, kVectors, QTR_F16, kEntries>, blocks, kThreads, 0, stream, p, vectors);
    default:
      return launch(multiply<kBits, kVectors, QTR_BF16, kEntries>, blocks, kThreads, 0, stream, p, vectors);
  }
}

template <int kBits, int kTiles>
void multiply_many(const Product& p, const Limbs& x, int limbs, int64_t first, int taken,
                   cudaStream_t stream) {
  const unsigned blocks = blocks_for(ceil_div(p.w.rows, 16));
  switch (limbs) {
    case 1:
      return launch(multiply_tiles<kBits, kTiles, 1>, blocks, kThreads, 0, stream, p, x, first, taken);
    case 2:
      return launch(multiply_tiles<kBits, kTiles, 2>, blocks, kThreads, 0, stream, p, x, first, taken);
    default:
      return launch(multiply_tiles<kBits, kTiles, 3>, blocks, kThreads, 0, stream, p, x, first, taken);
  }
}

template <int kBits>
void multiply_by_tiles(const Product& p, cudaStream_t stream) {
  const int limbs = p.x.dtype == QTR_BF16 ? 1 : p.x.dtype == QTR_F16 ? 2 : 3;
  const int64_t vectors = ceil_div(p.x.rows, 8) * 8;
  Scratch<uint16_t> numbers(limbs * vectors * p.whole, stream);
  Scratch<float> sums(vectors * (p.whole / 32), stream);
  const Limbs x{numbers.get(), sums.get(), vectors, p.whole};
  launch(split_vectors, blocks_for(ceil_div(vectors * (p.whole / 32), kWarps)), kThreads, 0, stream, p.x, x,
         limbs);
  for (int64_t first = 0; first < p.x.rows; first += 8 * kMostTiles) {
    const int taken = static_cast<int>(std::min<int64_t>(8 * kMostTiles, p.x.rows - first));
    if (taken <= 8)
      multiply_many<kBits, 1>(p, x, limbs, first, taken, stream);
    else
      multiply_many<kBits, kMostTiles>(p, x, limbs, first, taken, stream);
  }
}

// Vectors from `first` on.
Product part_of(Product p, int64_t first) {
  p.x.data = static_cast<const char*>(p.x.data) + first * p.x.row_stride * bytes_of(p.x.dtype);
  p.y.data = static_cast<char*>(p.y.data) + first * p.y.row_stride * bytes_of(p.y.dtype);
  return p;
}

template <int kBits>
void multiply_looked_up(const Product& p, cudaStream_t stream) {
  for (int64_t first = 0; first < p.x.rows; first += kMostLookedUp) {
    const Product part = part_of(p, first);
    const int taken = static_cast<int>(std::min<int64_t>(kMostLookedUp, p.x.rows - first));
    if (taken == 1)
      multiply_few<kBits, 1, true>(part, taken, stream);
    else if (taken <= kMostFew)
      multiply_few<kBits, kMostFew, true>(part, taken, stream);
    else
      multiply_few<kBits, kMostLookedUp, true>(part, taken, stream);
  }
}

template <int kBits>
void multiply_words(const Product& p, cudaStream_t stream) {
  if (p.table.data != nullptr) return multiply_looked_up<kBits>(p, stream);
  switch (p.x.rows) {
    case 1:
      return multiply_few<kBits, 1>(p, 1, stream);
    case 2:
      return multiply_few<kBits, 2>(p, 2, stream);
    case 3:
    case 4:
      return multiply_few<kBits, kMostFew>(p, static_cast<int>(p.x.rows), stream);
    default:
      return multiply_by_tiles<kBits>(p, stream);
  }
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
  const cudaStream_t stream = stream_of(a.device);
  Product p{};
  p.w = a.w;
  p.table = a.table;
  p.residuals = a.residuals;
  p.x = a.x;
  p.y = a.out;
  p.group = group_length(a.w);
  p.groups = ceil_div(a.w.cols, p.group);
  // Words are read where each plane of each row is aligned to 16 bytes, and 32 neighbours are of one group.
  const bool words = (a.w.bits == 2 || a.w.bits == 3 || a.w.bits == 4 || a.w.bits == 8) &&
                     a.w.cols % 128 == 0 && reinterpret_cast<uintptr_t>(a.w.codes) % 16 == 0 &&
                     (p.group % 32 == 0 || p.groups == 1);
  p.whole = words ? a.w.cols / kChunk * kChunk : 0;
  p.by_four = a.x.row_stride % 4 == 0 &&
              reinterpret_cast<uintptr_t>(a.x.data) % static_cast<uintptr_t>(4 * bytes_of(a.x.dtype)) == 0;
  if (p.whole == 0) {
    for (int64_t first = 0; first < a.x.rows; first += kMostFew)
      launch(multiply_one_by_one, blocks_for(ceil_div(a.w.rows, kWarps)), kThreads, 0, stream, p, first,
             static_cast<int>(std::min<int64_t>(kMostFew, a.x.rows - first)));
    return;
  }
  switch (a.w.bits) {
    case 2:
      return multiply_words<2>(p, stream);
    case 3:
      return multiply_words<3>(p, stream);
    case 4:
      return multiply_words<4>(p, stream);
    default:
      return multiply_words<8>(p, stream);
  }
}

}  // namespace quantrature::cuda
