// Arrays on the device under test: the memory of a GPU, or where kernels run on the host, the memory of the
// host.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#ifdef QUANTRATURE_TEST_ON_GPU
#include <cuda_runtime_api.h>
#endif

namespace quantrature {

template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(size_t count) : count_(count) {
#ifdef QUANTRATURE_TEST_ON_GPU
    cudaMalloc(&data_, bytes());
    cudaMemset(data_, 0x5A, bytes());
#else
    data_ = std::aligned_alloc(256, (bytes() + 255) / 256 * 256);
    std::memset(data_, 0x5A, bytes());
#endif
  }
  explicit DeviceArray(const std::vector<T>& from) : DeviceArray(from.size()) {
#ifdef QUANTRATURE_TEST_ON_GPU
    cudaMemcpy(data_, from.data(), sizeof(T) * count_, cudaMemcpyHostToDevice);
#else
    std::copy(from.begin(), from.end(), data());
#endif
  }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;
  ~DeviceArray() {
#ifdef QUANTRATURE_TEST_ON_GPU
    cudaFree(data_);
#else
    std::free(data_);
#endif
  }

  T* data() const { return static_cast<T*>(data_); }
  std::vector<T> read() const {
    std::vector<T> to(count_);
#ifdef QUANTRATURE_TEST_ON_GPU
    cudaDeviceSynchronize();
    cudaMemcpy(to.data(), data_, sizeof(T) * count_, cudaMemcpyDeviceToHost);
#else
    std::copy_n(data(), count_, to.data());
#endif
    return to;
  }

 private:
  size_t bytes() const { return sizeof(T) * (count_ == 0 ? 1 : count_); }
  size_t count_;
  void* data_ = nullptr;
};

}  // namespace quantrature
