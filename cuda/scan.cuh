// Sums over all that come before, and votes, for selection in order.
#pragma once

#include "launch.cuh"

namespace quantrature::cuda {

// The sum of n over the threads before this one; total: over all threads of the block.
template <int kThreads, class Count>
__device__ Count before_in_block(Count n, Count* total) {
  constexpr int kWarps = kThreads / 32;
  __shared__ Count of_warp[kWarps];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  Count up_to = n;
  for (int apart = 1; apart < 32; apart *= 2) {
    const Count other = __shfl_up_sync(0xffffffffu, up_to, static_cast<unsigned>(apart));
    if (lane >= apart) up_to += other;
  }
  if (lane == 31) of_warp[warp] = up_to;
  __syncthreads();
  Count before = up_to - n, all = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += of_warp[w];
    all += of_warp[w];
  }
  *total = all;
  __syncthreads();
  return before;
}

constexpr int kScanThreads = 1024;

// counts[i] becomes the sum of those before it, and counts[n] the sum of all. One block.
[[maybe_unused]] static __global__ void __launch_bounds__(kScanThreads)
    scan_counts(int64_t* counts, int64_t n) {
  __shared__ int64_t of_thread[kScanThreads];
  const int64_t each = (n + kScanThreads - 1) / kScanThreads;
  const int64_t first = threadIdx.x * each, last = first + each < n ? first + each : n;
  int64_t sum = 0;
  for (int64_t i = first; i < last; ++i) sum += counts[i];
  of_thread[threadIdx.x] = sum;
  __syncthreads();
  for (unsigned apart = 1; apart < kScanThreads; apart *= 2) {
    const int64_t other = threadIdx.x >= apart ? of_thread[threadIdx.x - apart] : 0;
    __syncthreads();
    of_thread[threadIdx.x] += other;
    __syncthreads();
  }
  int64_t at = of_thread[threadIdx.x] - sum;
  for (int64_t i = first; i < last; ++i) {
    const int64_t count = counts[i];
    counts[i] = at;
    at += count;
  }
  if (threadIdx.x == kScanThreads - 1) counts[n] = of_thread[threadIdx.x];
}

}  // namespace quantrature::cuda
