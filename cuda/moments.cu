// Numeric class L: one order of all sums, the same from run to run; not that of the CPU, with which results
// agree to 1e-12 relative. Every thread takes the moments of 16 numbers in registers, in two steps as the
// reference does, and merges them with what it had: the data is read once.
#include "backend.cuh"
#include "device/elements.cuh"
#include "launch.cuh"
#include "ops/moments/merge.hpp"

namespace quantrature::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kAtOnce = 16;                        // numbers in the registers of a thread
constexpr int64_t kRun = 16 * kThreads * kAtOnce;  // of a block over a tensor: 65536
constexpr int64_t kSlice = 256;                    // rows of a thread over columns

__device__ Moments moments_of(const float* x, int n) {
  Moments m{};
  m.count = n;
  double sum = 0;
  float low = x[0], high = x[0];
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i)
    if (i < n) {
      sum += static_cast<double>(x[i]);
      low = x[i] < low ? x[i] : low;
      high = x[i] > high ? x[i] : high;
    }
  m.mean = sum / n;
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i)
    if (i < n) {
      const double d = static_cast<double>(x[i]) - m.mean, d2 = d * d;
      m.m2 += d2;
      m.m3 += d2 * d;
      m.m4 += d2 * d2;
    }
  m.minimum = static_cast<double>(low) + 0.0;
  m.maximum = static_cast<double>(high) + 0.0;
  return m;
}

__device__ Moments from_lane(const Moments& m, int apart) {
  constexpr unsigned kAll = 0xffffffffu;
  return Moments{__shfl_down_sync(kAll, m.count, apart),  __shfl_down_sync(kAll, m.mean, apart),
                 __shfl_down_sync(kAll, m.m2, apart),     __shfl_down_sync(kAll, m.m3, apart),
                 __shfl_down_sync(kAll, m.m4, apart),     __shfl_down_sync(kAll, m.minimum, apart),
                 __shfl_down_sync(kAll, m.maximum, apart)};
}

// Of a warp, in lane 0.
__device__ Moments merge_warp(Moments m) {
  for (int apart = 16; apart > 0; apart /= 2) m = merged(m, from_lane(m, apart));
  return m;
}

// Of a block, in thread 0.
__device__ Moments merge_block(Moments m) {
  __shared__ Moments of_warp[kWarps];
  m = merge_warp(m);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = m;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int w = 1; w < kWarps; ++w) m = merged(m, of_warp[w]);
  return m;
}

// Elements [begin, end) of a row, `threads` of which this is number `thread`. Neighbouring threads read
// neighbouring numbers.
__device__ Moments moments_of_run(const qtr_matrix& x, int64_t row, int64_t begin, int64_t end, int thread,
                                  int threads) {
  Moments total{};
  const int64_t at = row * x.row_stride;
  for (int64_t base = begin; base < end; base += static_cast<int64_t>(threads) * kAtOnce) {
    float mine[kAtOnce];
    int n = 0;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t col = base + static_cast<int64_t>(i) * threads + thread;
      mine[i] = col < end ? load(x.data, x.dtype, at + col) : 0.0f;
      n += col < end;
    }
    if (n > 0) total = merged(total, moments_of(mine, n));
  }
  return total;
}

// A block for each run of a row.
__global__ void __launch_bounds__(kThreads)
    moments_of_runs(qtr_matrix x, int64_t length, int64_t per_row, Moments* out) {
  for (int64_t i = blockIdx.x; i < x.rows * per_row; i += gridDim.x) {
    const int64_t row = i / per_row, begin = i % per_row * length;
    const int64_t end = begin + length < x.cols ? begin + length : x.cols;
    const Moments m =
        merge_block(moments_of_run(x, row, begin, end, static_cast<int>(threadIdx.x), kThreads));
    if (threadIdx.x == 0) out[i] = m;
    __syncthreads();
  }
}

// A warp for each short run.
__global__ void __launch_bounds__(kThreads)
    moments_of_short_runs(qtr_matrix x, int64_t length, int64_t per_row, Moments* out) {
  const int64_t count = x.rows * per_row;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kWarps; first < count;
       first += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int64_t i = first + warp;
    if (i >= count) continue;
    const int64_t row = i / per_row, begin = i % per_row * length;
    const int64_t end = begin + length < x.cols ? begin + length : x.cols;
    const Moments m = merge_warp(moments_of_run(x, row, begin, end, lane, 32));
    if (lane == 0) out[i] = m;
  }
}

// All of them as one, in a fixed order.
__global__ void __launch_bounds__(kThreads) merge_all(const Moments* parts, int64_t count, Moments* out) {
  Moments total{};
  const int64_t each = (count + kThreads - 1) / kThreads;
  const int64_t begin = threadIdx.x * each;
  for (int64_t i = begin; i < begin + each && i < count; ++i) total = merged(total, parts[i]);
  total = merge_block(total);
  if (threadIdx.x == 0) *out = total;
}

// A thread for each column of a slice of a group of rows: part (group, slice, column).
__global__ void __launch_bounds__(kThreads)
    moments_of_columns(qtr_matrix x, int64_t group, int64_t slices, Moments* parts) {
  const int64_t col = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (col >= x.cols) return;
  const int64_t groups = (x.rows + group - 1) / group;
  for (int64_t i = blockIdx.y; i < groups * slices; i += gridDim.y) {
    const int64_t first = i / slices * group, begin = first + i % slices * kSlice;
    int64_t end = first + group < x.rows ? first + group : x.rows;
    end = begin + kSlice < end ? begin + kSlice : end;
    Moments total{};
    for (int64_t row = begin; row < end; row += kAtOnce) {
      float mine[kAtOnce];
      int n = 0;
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        mine[k] = row + k < end ? load(x.data, x.dtype, (row + k) * x.row_stride + col) : 0.0f;
        n += row + k < end;
      }
      total = merged(total, moments_of(mine, n));
    }
    parts[i * x.cols + col] = total;
  }
}

__global__ void __launch_bounds__(kThreads)
    merge_slices(const Moments* parts, int64_t groups, int64_t slices, int64_t cols, Moments* out) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < groups * cols; i += step) {
    const int64_t group = i / cols, col = i % cols;
    Moments total{};
    for (int64_t s = 0; s < slices; ++s) total = merged(total, parts[(group * slices + s) * cols + col]);
    out[i] = total;
  }
}

void over_rows(const qtr_matrix& x, int64_t length, int64_t per_row, Moments* out, cudaStream_t stream) {
  const int64_t count = x.rows * per_row;
  if (length <= 32 * kAtOnce * 4)
    launch(moments_of_short_runs, blocks_for(ceil_div(count, kWarps)), kThreads, 0, stream, x, length,
           per_row, out);
  else
    launch(moments_of_runs, blocks_for(count), kThreads, 0, stream, x, length, per_row, out);
}

}  // namespace

void moments(const qtr_moments_args& a) {
  const cudaStream_t stream = stream_of(a.device);
  Scratch<Moments> results(a.out_count, stream);
  if (a.over == QTR_OVER_TENSOR) {
    qtr_matrix x = a.x;
    if (x.rows == 1 || x.row_stride == x.cols) x = {x.data, 1, x.rows * x.cols, x.rows * x.cols, x.dtype};
    const int64_t per_row = ceil_div(x.cols, kRun);
    Scratch<Moments> parts(x.rows * per_row, stream);
    over_rows(x, kRun, per_row, parts.get(), stream);
    launch(merge_all, 1, kThreads, 0, stream, static_cast<const Moments*>(parts.get()), x.rows * per_row,
           results.get());
    return results.read(a.out, 1);
  }
  const int64_t length = a.over == QTR_OVER_COLUMNS ? a.x.rows : a.x.cols;
  const int64_t group = a.group_size == -1 ? length : std::min(a.group_size, length);
  if (a.over == QTR_OVER_ROWS) {
    over_rows(a.x, group, ceil_div(a.x.cols, group), results.get(), stream);
  } else {
    const int64_t groups = ceil_div(a.x.rows, group), slices = ceil_div(group, kSlice);
    // A last group that is short leaves empty slices, whose count is 0.
    Scratch<Moments> parts(groups * slices * a.x.cols, stream);
    const dim3 grid(static_cast<unsigned>(ceil_div(a.x.cols, kThreads)),
                    static_cast<unsigned>(std::min<int64_t>(groups * slices, 32768)));
    launch(moments_of_columns, grid, kThreads, 0, stream, a.x, group, slices, parts.get());
    launch(merge_slices, blocks_for(ceil_div(groups * a.x.cols, kThreads)), kThreads, 0, stream,
           static_cast<const Moments*>(parts.get()), groups, slices, a.x.cols, results.get());
  }
  results.read(a.out, a.out_count);
}

}  // namespace quantrature::cuda
