// PQI: element by element, four at a time where the caller's memory allows it. The sums of class L have one
// order, the same from run to run; not that of the CPU.
#include "backend.cuh"
#include "device/elements.cuh"
#include "finite.cuh"
#include "launch.cuh"

namespace quantrature::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int64_t kMostParts = 1024;  // of a sum, whose order depends on it

bool joined(const qtr_matrix& m) {
  return m.rows == 1 || m.row_stride == m.cols;
}
bool joined(const qtr_mutable_matrix& m) {
  return m.rows == 1 || m.row_stride == m.cols;
}

bool aligned(const void* data, qtr_dtype dtype) {
  return reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(4 * bytes_of(dtype)) == 0;
}

// Rows without gaps between them are one row.
struct Shape {
  int64_t rows, cols;
};

__device__ int64_t place(const Shape& s, int64_t stride, int64_t i) {
  return s.rows == 1 ? i : i / s.cols * stride + i % s.cols;
}

__global__ void __launch_bounds__(kThreads)
    accumulate(float* acc, qtr_matrix grad, float weight, int64_t n, bool by_four, Shape shape,
               int64_t acc_stride, int32_t* not_finite) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  int64_t rest = 0;
  bool finite = true;
  if (by_four) {
    for (int64_t i = first; i < n / 4; i += step) {
      Four sum = load4(acc, QTR_F32, i);
      const Four g = load4(grad.data, grad.dtype, i);
      for (int k = 0; k < 4; ++k) {
        finite = finite && is_finite(g.v[k]);
        sum.v[k] += weight * g.v[k];
      }
      store4(acc, QTR_F32, i, sum);
    }
    rest = n / 4 * 4;
  }
  for (int64_t i = rest + first; i < n; i += step) {
    const float g = load(grad.data, grad.dtype, place(shape, grad.row_stride, i));
    finite = finite && is_finite(g);
    acc[place(shape, acc_stride, i)] += weight * g;
  }
  if (!finite && not_finite != nullptr) *not_finite = 1;  // threads that write it all write the same
}

__device__ float share(float acc, float w, float image, bool keep_sign) {
  const float s = (image - w) * acc;
  return keep_sign ? s : std::abs(s);
}

__global__ void __launch_bounds__(kThreads)
    finalize(qtr_pqi_finalize_args a, int64_t n, bool by_four, Shape shape) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const bool keep_sign = a.keep_sign != 0;
  int64_t rest = 0;
  if (by_four) {
    for (int64_t i = first; i < n / 4; i += step) {
      const Four acc = load4(a.acc.data, QTR_F32, i), w = load4(a.w.data, a.w.dtype, i);
      const Four image = load4(a.w_quantized.data, a.w_quantized.dtype, i);
      Four out;
      for (int k = 0; k < 4; ++k) out.v[k] = share(acc.v[k], w.v[k], image.v[k], keep_sign);
      store4(a.out.data, QTR_F32, i, out);
    }
    rest = n / 4 * 4;
  }
  for (int64_t i = rest + first; i < n; i += step) {
    const float acc = load(a.acc.data, QTR_F32, place(shape, a.acc.row_stride, i));
    const float w = load(a.w.data, a.w.dtype, place(shape, a.w.row_stride, i));
    const float image =
        load(a.w_quantized.data, a.w_quantized.dtype, place(shape, a.w_quantized.row_stride, i));
    store(a.out.data, QTR_F32, place(shape, a.out.row_stride, i), share(acc, w, image, keep_sign));
  }
}

// Thread 0 has the sum over the block, added pairwise.
__device__ double add_block(double sum) {
  __shared__ double of_warp[kWarps];
  for (int apart = 16; apart > 0; apart /= 2) sum += __shfl_down_sync(0xffffffffu, sum, apart);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int w = 1; w < kWarps; ++w) sum += of_warp[w];
  return sum;
}

__global__ void __launch_bounds__(kThreads)
    sum_of_shares(qtr_pqi_sum_args a, int64_t n, bool by_four, Shape shape, double* parts) {
  double sum = 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const auto add = [&](float acc, float w, float image) {
    sum += (static_cast<double>(image) - static_cast<double>(w)) * static_cast<double>(acc);
  };
  int64_t rest = 0;
  if (by_four) {
#pragma unroll 2
    for (int64_t i = first; i < n / 4; i += step) {
      const Four acc = load4(a.acc.data, QTR_F32, i), w = load4(a.w.data, a.w.dtype, i);
      const Four image = load4(a.w_quantized.data, a.w_quantized.dtype, i);
      for (int k = 0; k < 4; ++k) add(acc.v[k], w.v[k], image.v[k]);
    }
    rest = n / 4 * 4;
  }
  for (int64_t i = rest + first; i < n; i += step)
    add(load(a.acc.data, QTR_F32, place(shape, a.acc.row_stride, i)),
        load(a.w.data, a.w.dtype, place(shape, a.w.row_stride, i)),
        load(a.w_quantized.data, a.w_quantized.dtype, place(shape, a.w_quantized.row_stride, i)));
  sum = add_block(sum);
  if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads) add_parts(const double* parts, int count, double* out) {
  double sum = 0;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) sum += parts[i];
  sum = add_block(sum);
  if (threadIdx.x == 0) *out = sum;
}

__global__ void __launch_bounds__(kThreads)
    between(qtr_interpolate_args a, float t, int64_t n, bool by_four, Shape shape) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const auto at = [t](float w, float image) { return t == 0 ? w : t == 1 ? image : w + t * (image - w); };
  int64_t rest = 0;
  if (by_four) {
    for (int64_t i = first; i < n / 4; i += step) {
      const Four w = load4(a.w.data, a.w.dtype, i), image = load4(a.w_quantized.data, a.w_quantized.dtype, i);
      Four out;
      for (int k = 0; k < 4; ++k) out.v[k] = at(w.v[k], image.v[k]);
      store4(a.out.data, a.out.dtype, i, out);
    }
    rest = n / 4 * 4;
  }
  for (int64_t i = rest + first; i < n; i += step)
    store(a.out.data, a.out.dtype, place(shape, a.out.row_stride, i),
          at(load(a.w.data, a.w.dtype, place(shape, a.w.row_stride, i)),
             load(a.w_quantized.data, a.w_quantized.dtype, place(shape, a.w_quantized.row_stride, i))));
}

// Enough blocks to keep a device busy, each with work for a while.
unsigned grid_of(int64_t n) {
  return blocks_for(std::min<int64_t>(ceil_div(n, kThreads * 4), 1 << 14));
}

Shape shape_of(bool all_joined, int64_t rows, int64_t cols) {
  return all_joined ? Shape{1, rows * cols} : Shape{rows, cols};
}

}  // namespace

void pqi_accumulate(const qtr_pqi_accumulate_args& a) {
  const bool flat = joined(a.acc) && joined(a.grad);
  const int64_t n = a.acc.rows * a.acc.cols;
  const bool by_four = flat && aligned(a.acc.data, QTR_F32) && aligned(a.grad.data, a.grad.dtype);
  launch(accumulate, grid_of(n), kThreads, 0, stream_of(a.device), static_cast<float*>(a.acc.data), a.grad,
         static_cast<float>(a.weight), n, by_four, shape_of(flat, a.acc.rows, a.acc.cols), a.acc.row_stride,
         a.not_finite);
}

void pqi_finalize(const qtr_pqi_finalize_args& a) {
  const bool flat = joined(a.acc) && joined(a.w) && joined(a.w_quantized) && joined(a.out);
  const int64_t n = a.acc.rows * a.acc.cols;
  const bool by_four = flat && aligned(a.acc.data, QTR_F32) && aligned(a.w.data, a.w.dtype) &&
                       aligned(a.w_quantized.data, a.w_quantized.dtype) && aligned(a.out.data, QTR_F32);
  launch(finalize, grid_of(n), kThreads, 0, stream_of(a.device), a, n, by_four,
         shape_of(flat, a.acc.rows, a.acc.cols));
}

void pqi_sum(const qtr_pqi_sum_args& a) {
  const cudaStream_t stream = stream_of(a.device);
  const bool flat = joined(a.acc) && joined(a.w) && joined(a.w_quantized);
  const int64_t n = a.acc.rows * a.acc.cols;
  const bool by_four = flat && aligned(a.acc.data, QTR_F32) && aligned(a.w.data, a.w.dtype) &&
                       aligned(a.w_quantized.data, a.w_quantized.dtype);
  const int parts_taken = static_cast<int>(std::min(kMostParts, ceil_div(n, 4 * kThreads)));
  Scratch<double> parts(parts_taken, stream), total(1, stream);
  launch(sum_of_shares, static_cast<unsigned>(parts_taken), kThreads, 0, stream, a, n, by_four,
         shape_of(flat, a.acc.rows, a.acc.cols), parts.get());
  launch(add_parts, 1, kThreads, 0, stream, static_cast<const double*>(parts.get()), parts_taken,
         total.get());
  total.read(a.out, 1);
}

void interpolate(const qtr_interpolate_args& a) {
  const bool flat = joined(a.w) && joined(a.w_quantized) && joined(a.out);
  const int64_t n = a.w.rows * a.w.cols;
  const bool by_four = flat && aligned(a.w.data, a.w.dtype) &&
                       aligned(a.w_quantized.data, a.w_quantized.dtype) && aligned(a.out.data, a.out.dtype);
  launch(between, grid_of(n), kThreads, 0, stream_of(a.device), a, static_cast<float>(a.t), n, by_four,
         shape_of(flat, a.w.rows, a.w.cols));
}

}  // namespace quantrature::cuda
