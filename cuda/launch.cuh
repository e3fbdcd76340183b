// How a launcher talks to the device: streams, scratch memory, errors. Everything is ordered by the caller's
// stream.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/ceil_div.hpp"
#include "quantrature/c_api.h"

namespace quantrature::cuda {

// The caller's fault, found on the device; everything else that is thrown here is the device's.
struct Refused : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline void expect(cudaError_t error, const char* doing) {
  if (error == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());  // so that the next call does not find it
  throw std::runtime_error(std::string(doing) + ": " + cudaGetErrorString(error));
}

inline cudaStream_t stream_of(const qtr_device& device) {
  return static_cast<cudaStream_t>(device.stream);
}

inline int attribute_of(cudaDeviceAttr which, int ordinal) {
  int value = 0;
  expect(cudaDeviceGetAttribute(&value, which, ordinal), "asking for an attribute of the device");
  return value;
}

// Blocks for n pieces of work over which a kernel strides.
inline unsigned blocks_for(int64_t pieces) {
  return static_cast<unsigned>(std::clamp<int64_t>(pieces, 1, 1 << 20));
}

// The shared memory of a block whose size the launch gives.
#ifdef QUANTRATURE_CUDA_ON_HOST
using cuda_on_host::dynamic_shared;
#else
__device__ __forceinline__ void* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
}
#endif

// Queues a kernel; arguments become the types of its parameters.
template <class... Parameters>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            std::type_identity_t<Parameters>... arguments) {
#ifdef QUANTRATURE_CUDA_ON_HOST
  static_cast<void>(stream);
  cuda_on_host::launch(kernel, grid, block, shared_bytes, arguments...);
#else
  void* pointers[] = {&arguments...};
  expect(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, pointers, shared_bytes, stream),
         "launching a kernel");
#endif
}

// Where calls take memory from. What they give back stays there, up to 1 GiB or a thirty-second of the
// device's memory: the default pool returns all of it whenever somebody waits, and to map it anew takes
// longer than most kernels.
inline cudaMemPool_t pool_of(int ordinal) {
  static std::mutex guard;
  static std::map<int, cudaMemPool_t> pools;
  const std::lock_guard lock(guard);
  const auto [at, is_new] = pools.try_emplace(ordinal, nullptr);
  if (is_new) {
    cudaMemPoolProps about{};
    about.allocType = cudaMemAllocationTypePinned;
    about.location = {cudaMemLocationTypeDevice, ordinal};
    size_t free = 0, all = 0;
    expect(cudaMemGetInfo(&free, &all), "asking for the size of the memory");
    uint64_t kept = std::min<uint64_t>(all / 32, uint64_t{1} << 30);
    expect(cudaMemPoolCreate(&at->second, &about), "making a pool of memory");
    expect(cudaMemPoolSetAttribute(at->second, cudaMemPoolAttrReleaseThreshold, &kept),
           "keeping memory of a pool");
  }
  return at->second;
}

// Memory of one call, given back in the order of the stream.
template <class T>
class Scratch {
 public:
  Scratch(int64_t count, cudaStream_t stream) : stream_(stream) {
    const size_t bytes = sizeof(T) * static_cast<size_t>(std::max<int64_t>(1, count));
    int ordinal = 0;
    expect(cudaGetDevice(&ordinal), "finding the current device");
    expect(cudaMallocFromPoolAsync(reinterpret_cast<void**>(&data_), bytes, pool_of(ordinal), stream),
           "allocating scratch memory");
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { static_cast<void>(cudaFreeAsync(data_, stream_)); }

  T* get() const { return data_; }
  void fill_bytes(int value, int64_t count) {
    expect(cudaMemsetAsync(data_, value, sizeof(T) * static_cast<size_t>(count), stream_),
           "filling scratch memory");
  }
  // Waits for the stream.
  void read(T* to, int64_t count, int64_t from = 0) const {
    expect(cudaMemcpyAsync(to, data_ + from, sizeof(T) * static_cast<size_t>(count), cudaMemcpyDeviceToHost,
                           stream_),
           "reading results");
    expect(cudaStreamSynchronize(stream_), "waiting for the device");
  }
  void write(const T* from, int64_t count) {
    expect(
        cudaMemcpyAsync(data_, from, sizeof(T) * static_cast<size_t>(count), cudaMemcpyHostToDevice, stream_),
        "writing arguments");
  }

 private:
  T* data_ = nullptr;
  cudaStream_t stream_;
};

// The device of a call is the current one while it lasts.
class CurrentDevice {
 public:
  explicit CurrentDevice(int ordinal) {
    expect(cudaGetDevice(&before_), "finding the current device");
    if (ordinal != before_) expect(cudaSetDevice(ordinal), "choosing the device");
    now_ = ordinal;
  }
  ~CurrentDevice() {
    if (now_ != before_) static_cast<void>(cudaSetDevice(before_));
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int before_ = 0, now_ = 0;
};

}  // namespace quantrature::cuda
