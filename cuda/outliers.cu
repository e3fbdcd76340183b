// The largest elements apart from the rest, as a sparse matrix. Numeric class E.
#include "backend.cuh"
#include "device/elements.cuh"
#include "launch.cuh"
#include "layout/csr.hpp"
#include "select.cuh"

namespace quantrature::cuda {
namespace {

constexpr int kThreads = 256;

// The first place in ascending indices that is not below i.
__device__ int64_t lower_bound(const int64_t* indices, int64_t n, int64_t i) {
  int64_t low = 0, high = n;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (indices[middle] < i)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

__global__ void __launch_bounds__(kThreads)
    write_offsets(const int64_t* indices, int64_t nnz, int64_t rows, int64_t cols, void* offsets) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; row <= rows; row += step) {
    const int64_t at = lower_bound(indices, nnz, row * cols);
    if (wide_offsets(nnz))
      static_cast<int64_t*>(offsets)[row] = at;
    else
      static_cast<int32_t*>(offsets)[row] = static_cast<int32_t>(at);
  }
}

// Columns of the outliers, 0 in their places; with copy_values, their values too.
__global__ void __launch_bounds__(kThreads)
    take_out(qtr_outliers_args a, const int64_t* indices, int64_t nnz, bool copy_values) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < nnz; i += step) {
    const int64_t row = indices[i] / a.w.cols, col = indices[i] % a.w.cols;
    const int64_t from = row * a.w.row_stride + col, place = row * a.remainder.row_stride + col;
    if (a.w.cols <= kNarrowCols)
      static_cast<uint16_t*>(a.columns)[i] = static_cast<uint16_t>(col);
    else
      static_cast<int32_t*>(a.columns)[i] = static_cast<int32_t>(col);
    if (a.w.dtype == QTR_F32) {
      if (copy_values) static_cast<uint32_t*>(a.values)[i] = static_cast<const uint32_t*>(a.w.data)[from];
      static_cast<uint32_t*>(a.remainder.data)[place] = 0;
    } else {
      if (copy_values) static_cast<uint16_t*>(a.values)[i] = static_cast<const uint16_t*>(a.w.data)[from];
      static_cast<uint16_t*>(a.remainder.data)[place] = 0;
    }
  }
}

// The first place at which given indices are not within the matrix, or do not ascend.
__global__ void __launch_bounds__(kThreads)
    check_indices(const int64_t* indices, int64_t n, int64_t elements, unsigned long long* first_bad) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += step)
    if (indices[i] < 0 || indices[i] >= elements || (i > 0 && indices[i - 1] >= indices[i]))
      atomicMin(first_bad, static_cast<unsigned long long>(i));
}

unsigned grid_of(int64_t n) {
  return blocks_for(std::min<int64_t>(ceil_div(n, kThreads), 1 << 14));
}

void check_given(const qtr_outliers_args& a, cudaStream_t stream) {
  const int64_t elements = a.w.rows * a.w.cols;
  Scratch<unsigned long long> first_bad(1, stream);
  first_bad.fill_bytes(0xFF, 1);
  launch(check_indices, grid_of(a.count), kThreads, 0, stream, a.indices, a.count, elements, first_bad.get());
  unsigned long long at = 0;
  first_bad.read(&at, 1);
  if (at == ~0ull) return;
  int64_t index = 0;
  expect(cudaMemcpyAsync(&index, a.indices + at, sizeof(index), cudaMemcpyDeviceToHost, stream),
         "reading an index");
  expect(cudaStreamSynchronize(stream), "waiting for the device");
  const std::string where = ": got index=" + std::to_string(index) + ", position=" + std::to_string(at);
  if (index < 0 || index >= elements)
    throw Refused("[extract_outliers] indices must be within w" + where +
                  ", elements=" + std::to_string(elements));
  throw Refused("[extract_outliers] indices must ascend, each given once" + where);
}

}  // namespace

void outliers(const qtr_outliers_args& a) {
  const cudaStream_t stream = stream_of(a.device);
  const int64_t nnz = a.per_row ? a.w.rows * a.count : a.count;
  Scratch<int64_t> chosen(a.indices == nullptr ? nnz : 0, stream);
  const int64_t* indices = a.indices;
  if (indices == nullptr) {
    const qtr_topk_args selection{sizeof(qtr_topk_args), &a.w,     1,       a.count, QTR_KEY_ABS, a.per_row,
                                  chosen.get(),          a.values, nullptr, a.device};
    select_largest(selection, "extract_outliers", "w");
    indices = chosen.get();
  } else if (nnz > 0) {
    check_given(a, stream);
  }
  const size_t size = static_cast<size_t>(bytes_of(a.w.dtype));
  const bool joined = a.w.rows == 1 || (a.w.row_stride == a.w.cols && a.remainder.row_stride == a.w.cols);
  if (a.remainder.data == a.w.data) {
    // The outliers are taken out where they are.
  } else if (joined) {
    expect(cudaMemcpyAsync(a.remainder.data, a.w.data, static_cast<size_t>(a.w.rows * a.w.cols) * size,
                           cudaMemcpyDeviceToDevice, stream),
           "copying the remainder");
  } else {
    expect(cudaMemcpy2DAsync(a.remainder.data, static_cast<size_t>(a.remainder.row_stride) * size, a.w.data,
                             static_cast<size_t>(a.w.row_stride) * size, static_cast<size_t>(a.w.cols) * size,
                             static_cast<size_t>(a.w.rows), cudaMemcpyDeviceToDevice, stream),
           "copying the remainder");
  }
  launch(write_offsets, grid_of(a.w.rows + 1), kThreads, 0, stream, indices, nnz, a.w.rows, a.w.cols,
         a.row_offsets);
  if (nnz > 0) launch(take_out, grid_of(nnz), kThreads, 0, stream, a, indices, nnz, a.indices != nullptr);
}

}  // namespace quantrature::cuda
