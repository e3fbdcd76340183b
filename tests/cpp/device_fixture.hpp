// What tests of ops on a device share.
#pragma once

#include <cstring>
#include <string>
#include <vector>

#include "cases.hpp"
#include "device_memory.hpp"
#include "quantrature/device.hpp"

namespace quantrature {

inline const Device kDevice{QTR_CUDA, 0, nullptr};

class OnDevice : public testing::Test {
 protected:
  void SetUp() override {
    std::string why;
    if (cuda_device_count(&why) == 0) GTEST_SKIP() << "no CUDA device: " << why;
  }
};

// A sample in the memory of the device.
struct Input {
  DeviceArray<uint8_t> memory;
  Matrix m;

  static std::vector<uint8_t> bytes_of(const cases::Sample& s) {
    const Matrix v = s.view();
    const size_t size = static_cast<size_t>(s.rows * s.stride) * (s.dtype == QTR_F32 ? 4 : 2);
    std::vector<uint8_t> bytes(size);
    std::memcpy(bytes.data(), v.data, size);
    return bytes;
  }
  explicit Input(const cases::Sample& s)
      : memory(bytes_of(s)), m{memory.data(), s.rows, s.cols, s.stride, s.dtype} {}
};

template <class T>
void expect_same(const std::vector<T>& device, const std::vector<T>& host) {
  ASSERT_EQ(device.size(), host.size());
  EXPECT_EQ(std::memcmp(device.data(), host.data(), sizeof(T) * host.size()), 0);
}

}  // namespace quantrature
