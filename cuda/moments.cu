// Numeric class L: one order of all sums, the same from run to run; not that of the CPU, with which results
// agree to 1e-12 relative. The data is read once. Threads that share a run of numbers take the mean of its
// first chunk as a pivot and add the first four powers of all distances from it; what the pivot is off by is
// taken out at the end. Where the chunk is a fraction f of the run, the variance is at least f times the
// square of what the pivot is off by, so that no more than a factor of 16 / f of the precision of double is
// lost.
#include <limits>

#include "backend.cuh"
#include "constants.cuh"
#include "device/elements.cuh"
#include "launch.cuh"
#include "ops/moments/merge.hpp"

namespace quantrature::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kAtOnce = 16;                          // numbers of a chunk in the registers of a thread
constexpr int64_t kWarpRun = 8 * 32 * kAtOnce;       // of a warp around one pivot: 4096
constexpr int64_t kRun = kWarps * kWarpRun;          // of a block over a tensor: 32768
constexpr int64_t kLongestOfWarp = 4 * kWarpRun;     // longer runs of a row have a block
constexpr int64_t kLongestOfFour = 2 * 4 * kAtOnce;  // shorter ones four threads
constexpr int64_t kSlice = 256;                      // rows of a thread over columns
constexpr int kColumns = 32;                         // of a block that merges slices

// Sums of powers of the distances from a pivot.
struct Powers {
  double pivot = 0;
  double sum[4] = {};
  float low = std::numeric_limits<float>::infinity(), high = -std::numeric_limits<float>::infinity();

  __device__ __forceinline__ void add(float x) {
    const double d = static_cast<double>(x) - pivot, d2 = d * d;
    sum[0] += d;
    sum[1] += d2;
    sum[2] = std::fma(d2, d, sum[2]);
    sum[3] = std::fma(d2, d2, sum[3]);
    low = fminf(low, x);
    high = fmaxf(high, x);
  }

  __device__ Moments around_mean(double count) const {
    const double off = sum[0] / count, off2 = off * off;
    Moments m{};
    m.count = count;
    m.mean = pivot + off;
    m.m2 = sum[1] - count * off2;
    m.m3 = sum[2] - off * (3 * sum[1] - 2 * count * off2);
    m.m4 = sum[3] - off * (4 * sum[2] - off * (6 * sum[1] - 3 * count * off2));
    m.minimum = static_cast<double>(low) + 0.0;
    m.maximum = static_cast<double>(high) + 0.0;
    return m;
  }
};

template <int kWidth, class T>
__device__ T add_threads(T x) {
#pragma unroll
  for (int apart = kWidth / 2; apart > 0; apart /= 2) x += __shfl_xor_sync(0xffffffffu, x, apart);
  return x;
}

__device__ Moments from_lane(const Moments& m, int apart) {
  constexpr unsigned kAll = 0xffffffffu;
  return Moments{__shfl_down_sync(kAll, m.count, apart),  __shfl_down_sync(kAll, m.mean, apart),
                 __shfl_down_sync(kAll, m.m2, apart),     __shfl_down_sync(kAll, m.m3, apart),
                 __shfl_down_sync(kAll, m.m4, apart),     __shfl_down_sync(kAll, m.minimum, apart),
                 __shfl_down_sync(kAll, m.maximum, apart)};
}

// Elements [begin, end) of a row, for kWidth neighbouring threads, in all of which the result is. by_four:
// elements from begin on are aligned for loads of four. All threads of a warp come here.
template <qtr_dtype kDtype, int kWidth>
__device__ Moments moments_of_run(const void* row, int64_t begin, int64_t end, int lane, bool by_four) {
  constexpr int64_t kChunk = kWidth * kAtOnce;
  float mine[kAtOnce];
  // How many there are; they come first.
  const auto read_chunk = [&](int64_t base) {
    if (by_four && base + kChunk <= end) {
#pragma unroll
      for (int i = 0; i < kAtOnce / 4; ++i) {
        const Four four = load4(row, kDtype, base / 4 + i * kWidth + lane);
#pragma unroll
        for (int e = 0; e < 4; ++e) mine[4 * i + e] = four.v[e];
      }
      return kAtOnce;
    }
    int n = 0;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t col = base + i * kWidth + lane;
      mine[i] = col < end ? load(row, kDtype, col) : 0.0f;
      n += col < end;
    }
    return n;
  };
  Powers powers;
  const auto add_chunk = [&](int n) {
    if (n == kAtOnce) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) powers.add(mine[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        if (i < n) powers.add(mine[i]);
    }
  };
  int n = read_chunk(begin);
  double sum = 0;
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) sum += static_cast<double>(mine[i]);
  const int64_t in_chunk = end - begin < kChunk ? end - begin : kChunk;
  powers.pivot = add_threads<kWidth>(sum) / static_cast<double>(in_chunk);
  add_chunk(n);
  for (int64_t base = begin + kChunk; base < end; base += kChunk) {
    n = read_chunk(base);
    add_chunk(n);
  }
  for (double& power : powers.sum) power = add_threads<kWidth>(power);
#pragma unroll
  for (int apart = kWidth / 2; apart > 0; apart /= 2) {
    powers.low = fminf(powers.low, __shfl_xor_sync(0xffffffffu, powers.low, apart));
    powers.high = fmaxf(powers.high, __shfl_xor_sync(0xffffffffu, powers.high, apart));
  }
  return powers.around_mean(static_cast<double>(end - begin));
}

// Of a warp, in lane 0. Those of lanes from `lanes` on are empty.
__device__ Moments merge_warp(Moments m, int lanes = 32) {
  for (int apart = lanes / 2; apart > 0; apart /= 2) m = merged(m, from_lane(m, apart));
  return m;
}

// Of a block, in thread 0, from those in lane 0 of each warp.
__device__ Moments merge_block(const Moments& m) {
  __shared__ Moments of_warp[kWarps];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  if (lane == 0) of_warp[warp] = m;
  __syncthreads();
  Moments all{};
  if (warp == 0) all = merge_warp(lane < kWarps ? of_warp[lane] : Moments{}, kWarps);
  __syncthreads();
  return all;
}

// Rows that are cut into runs, all but the last of `length` elements.
struct Runs {
  qtr_matrix x;
  int64_t length, per_row;
  bool by_four;  // each run begins where four elements can be loaded

  Runs(const qtr_matrix& matrix, int64_t run_length)
      : x(matrix), length(run_length), per_row(ceil_div(matrix.cols, run_length)) {
    by_four = (per_row == 1 || length % 4 == 0) && (x.rows == 1 || x.row_stride % 4 == 0) &&
              reinterpret_cast<uintptr_t>(x.data) % static_cast<uintptr_t>(4 * bytes_of(x.dtype)) == 0;
  }
  QUANTRATURE_INLINE int64_t count() const { return x.rows * per_row; }
};

struct RunPlace {
  const void* row;
  int64_t begin, end;

  __device__ RunPlace(const Runs& runs, int64_t i, int64_t size) {
    const int64_t at = runs.count() <= UINT32_MAX
                           ? static_cast<uint32_t>(i) / static_cast<uint32_t>(runs.per_row)
                           : i / runs.per_row;
    row = static_cast<const char*>(runs.x.data) + at * runs.x.row_stride * size;
    begin = (i - at * runs.per_row) * runs.length;
    end = begin + runs.length < runs.x.cols ? begin + runs.length : runs.x.cols;
  }
};

template <qtr_dtype kDtype>
constexpr int64_t kSizeOf = kDtype == QTR_F32 ? 4 : 2;

// A block for each run of a row; its warps take parts in turn.
template <qtr_dtype kDtype>
__global__ void __launch_bounds__(kThreads) moments_of_runs(Runs runs, Moments* out) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  for (int64_t i = blockIdx.x; i < runs.count(); i += gridDim.x) {
    const RunPlace run(runs, i, kSizeOf<kDtype>);
    Moments total{};
    for (int64_t begin = run.begin + warp * kWarpRun; begin < run.end; begin += kRun) {
      const int64_t end = begin + kWarpRun < run.end ? begin + kWarpRun : run.end;
      total = merged(total, moments_of_run<kDtype, 32>(run.row, begin, end, lane, runs.by_four));
    }
    total = merge_block(total);
    if (threadIdx.x == 0) out[i] = total;
  }
}

// kWidth threads for each short run.
template <qtr_dtype kDtype, int kWidth>
__global__ void __launch_bounds__(kThreads) moments_of_short_runs(Runs runs, Moments* out) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWidth;
  const int lane = static_cast<int>(threadIdx.x) % kWidth;
  const RunPlace run(runs, i < runs.count() ? i : runs.count() - 1, kSizeOf<kDtype>);
  const Moments m = moments_of_run<kDtype, kWidth>(run.row, run.begin, run.end, lane, runs.by_four);
  if (lane == 0 && i < runs.count()) out[i] = m;
}

// All of them as one, in a fixed order.
__global__ void __launch_bounds__(kThreads) merge_all(const Moments* parts, int64_t count, Moments* out) {
  Moments total{};
  const int64_t each = (count + kThreads - 1) / kThreads;
  const int64_t begin = threadIdx.x * each;
  for (int64_t i = begin; i < begin + each && i < count; ++i) total = merged(total, parts[i]);
  total = merge_block(merge_warp(total));
  if (threadIdx.x == 0) *out = total;
}

// A thread for each column of a slice of a group of rows: part (group, slice, column).
template <qtr_dtype kDtype>
__global__ void __launch_bounds__(kThreads)
    moments_of_columns(qtr_matrix x, int64_t group, int64_t slices, Moments* parts) {
  const int64_t col = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (col >= x.cols) return;
  const int64_t groups = (x.rows + group - 1) / group;
  for (int64_t i = blockIdx.y; i < groups * slices; i += gridDim.y) {
    const int64_t first = i / slices * group, begin = first + i % slices * kSlice;
    int64_t end = first + group < x.rows ? first + group : x.rows;
    end = begin + kSlice < end ? begin + kSlice : end;
    Powers powers;
    for (int64_t row = begin; row < end; row += kAtOnce) {
      float mine[kAtOnce];
      const int64_t at = row * x.row_stride + col;
      const int n = static_cast<int>(end - row < kAtOnce ? end - row : kAtOnce);
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) mine[k] = k < n ? load(x.data, kDtype, at + k * x.row_stride) : 0.0f;
      if (row == begin) {
        double sum = 0;
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) sum += static_cast<double>(mine[k]);
        powers.pivot = sum / n;
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k)
        if (k < n) powers.add(mine[k]);
    }
    parts[i * x.cols + col] = begin < end ? powers.around_mean(static_cast<double>(end - begin)) : Moments{};
  }
}

// Every warp of a block merges some slices of the same columns.
__global__ void __launch_bounds__(kThreads)
    merge_slices(const Moments* parts, int64_t groups, int64_t slices, int64_t cols, Moments* out) {
  __shared__ Moments of_warp[kWarps][kColumns];
  const int warp = static_cast<int>(threadIdx.x) / kColumns, lane = static_cast<int>(threadIdx.x) % kColumns;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kColumns; first < groups * cols;
       first += static_cast<int64_t>(gridDim.x) * kColumns) {
    const int64_t i = first + lane, group = i / cols, col = i % cols;
    Moments total{};
    if (i < groups * cols)
      for (int64_t s = warp; s < slices; s += kWarps)
        total = merged(total, parts[(group * slices + s) * cols + col]);
    of_warp[warp][lane] = total;
    __syncthreads();
    if (warp == 0 && i < groups * cols) {
      for (int w = 1; w < kWarps; ++w) total = merged(total, of_warp[w][lane]);
      out[i] = total;
    }
    __syncthreads();
  }
}

void over_rows(const Runs& runs, Moments* out, cudaStream_t stream) {
  const auto blocks = [&](int64_t threads) {
    return static_cast<unsigned>(ceil_div(runs.count() * threads, kThreads));
  };
  with_dtype(runs.x.dtype, [&](auto dtype) {
    if (runs.length <= kLongestOfFour)
      launch(moments_of_short_runs<dtype.value, 4>, blocks(4), kThreads, 0, stream, runs, out);
    else if (runs.length <= kLongestOfWarp)
      launch(moments_of_short_runs<dtype.value, 32>, blocks(32), kThreads, 0, stream, runs, out);
    else
      launch(moments_of_runs<dtype.value>, blocks_for(runs.count()), kThreads, 0, stream, runs, out);
  });
}

}  // namespace

void moments(const qtr_moments_args& a) {
  const cudaStream_t stream = stream_of(a.device);
  Scratch<Moments> results(a.out_count, stream);
  if (a.over == QTR_OVER_TENSOR) {
    qtr_matrix x = a.x;
    if (x.rows == 1 || x.row_stride == x.cols) x = {x.data, 1, x.rows * x.cols, x.rows * x.cols, x.dtype};
    const Runs runs(x, kRun);
    Scratch<Moments> parts(runs.count(), stream);
    over_rows(runs, parts.get(), stream);
    launch(merge_all, 1, kThreads, 0, stream, static_cast<const Moments*>(parts.get()), runs.count(),
           results.get());
    return results.read(a.out, 1);
  }
  const int64_t length = a.over == QTR_OVER_COLUMNS ? a.x.rows : a.x.cols;
  const int64_t group = a.group_size == -1 ? length : std::min(a.group_size, length);
  if (a.over == QTR_OVER_ROWS) {
    over_rows(Runs(a.x, group), results.get(), stream);
  } else {
    const int64_t groups = ceil_div(a.x.rows, group), slices = ceil_div(group, kSlice);
    // A last group that is short leaves empty slices, whose count is 0.
    Scratch<Moments> parts(slices > 1 ? groups * slices * a.x.cols : 0, stream);
    const dim3 grid(static_cast<unsigned>(ceil_div(a.x.cols, kThreads)),
                    static_cast<unsigned>(std::min<int64_t>(groups * slices, 32768)));
    with_dtype(a.x.dtype, [&](auto dtype) {
      launch(moments_of_columns<dtype.value>, grid, kThreads, 0, stream, a.x, group, slices,
             slices > 1 ? parts.get() : results.get());
    });
    if (slices > 1)
      launch(merge_slices, blocks_for(ceil_div(groups * a.x.cols, kColumns)), kThreads, 0, stream,
             static_cast<const Moments*>(parts.get()), groups, slices, a.x.cols, results.get());
  }
  results.read(a.out, a.out_count);
}

}  // namespace quantrature::cuda
