// Hadamard transforms, a block for each row, which lies in shared memory where it fits. Numeric class L, and
// the same bits as on the CPU: each number comes from the same additions in the same order.
#include <bit>

#include "backend.cuh"
#include "device/elements.cuh"
#include "launch.cuh"
#include "ops/hadamard/factor.hpp"

namespace quantrature::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int64_t kInShared = 48 << 10;  // bytes of a row

struct Transform {
  qtr_matrix x;
  qtr_mutable_matrix out;
  const uint8_t* signs;
  const float* factor;  // order x order
  int64_t order, block;
  float norm;
  bool inverse;
  float* rows;  // memory for a row of each block, or null: it is in shared memory
};

__device__ float signed_by(const uint8_t* signs, int64_t i, float x) {
  return std::bit_cast<float>(std::bit_cast<uint32_t>(x) ^ uint32_t{signs[i / 8]} >> i % 8 << 31);
}

__global__ void __launch_bounds__(kThreads) transform_rows(Transform t) {
  float* work = t.rows == nullptr ? static_cast<float*>(dynamic_shared()) : t.rows + blockIdx.x * t.x.cols;
  const int64_t n = t.x.cols;
  for (int64_t row = blockIdx.x; row < t.x.rows; row += gridDim.x) {
    for (int64_t i = threadIdx.x; i < n; i += kThreads) {
      const float x = load(t.x.data, t.x.dtype, row * t.x.row_stride + i);
      work[i] = t.signs != nullptr && !t.inverse ? signed_by(t.signs, i, x) : x;
    }
    __syncthreads();
    for (int64_t half = 1; half < t.block; half *= 2) {
      for (int64_t pair = threadIdx.x; pair < n / 2; pair += kThreads) {
        const int64_t i = pair / half * 2 * half + pair % half;
        const float a = work[i], b = work[i + half];
        work[i] = a + b;
        work[i + half] = a - b;
      }
      __syncthreads();
    }
    for (int64_t i = threadIdx.x; i < n; i += kThreads) {
      float y = work[i];
      if (t.order > 1) {
        const int64_t c = i / t.block, at = i % t.block;
        y = t.factor[c] * work[at];
        for (int64_t b = 1; b < t.order; ++b) y += t.factor[b * t.order + c] * work[b * t.block + at];
      }
      y *= t.norm;
      store(t.out.data, t.out.dtype, row * t.out.row_stride + i,
            t.signs != nullptr && t.inverse ? signed_by(t.signs, i, y) : y);
    }
    __syncthreads();
  }
}

}  // namespace

void hadamard(const qtr_hadamard_args& a) {
  const cudaStream_t stream = stream_of(a.device);
  const int64_t n = a.x.cols, order = hadamard_order_of(n);
  const std::vector<float> made = hadamard_factor_of(order, a.inverse != 0);
  Scratch<float> factor(static_cast<int64_t>(made.size()), stream);
  if (!made.empty()) factor.write(made.data(), static_cast<int64_t>(made.size()));
  const int64_t bytes = n * static_cast<int64_t>(sizeof(float));
  const bool shared = bytes <= kInShared;
  const unsigned blocks = blocks_for(std::min<int64_t>(a.x.rows, shared ? 1 << 16 : 1024));
  Scratch<float> rows(shared ? 0 : blocks * n, stream);
  launch(transform_rows, blocks, kThreads, shared ? static_cast<size_t>(bytes) : 0, stream,
         Transform{a.x, a.out, a.signs, factor.get(), order, n / order,
                   static_cast<float>(1 / std::sqrt(static_cast<double>(n))), a.inverse != 0,
                   shared ? nullptr : rows.get()});
}

}  // namespace quantrature::cuda
