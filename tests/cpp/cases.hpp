// The inputs that every op is tested on, and how to run something on every target and thread count.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "common/half.hpp"
#include "quantrature/quantrature.hpp"

namespace quantrature::cases {

// Lengths around the widths of vectors, lanes and chunks.
inline const std::vector<int64_t> kLengths = {1,  2,  3,  7,   8,   9,   15,  16,   17,   31,   32,   33,  63,
                                              64, 65, 96, 127, 128, 129, 255, 1000, 4095, 4096, 4097, 9001};

// A matrix of one dtype with a row stride that may exceed its columns; `values` holds what the core reads.
struct Sample {
  std::string name;
  int64_t rows, cols, stride;
  DType dtype;
  std::vector<float> values;   // rows x stride, already representable in dtype
  std::vector<uint16_t> bits;  // the same in a 16-bit dtype

  Matrix view() const {
    const void* data = dtype == QTR_F32 ? static_cast<const void*>(values.data()) : bits.data();
    return Matrix{data, rows, cols, stride, dtype};
  }
  float at(int64_t row, int64_t col) const { return values[static_cast<size_t>(row * stride + col)]; }
};

inline Sample sample(const std::string& kind, int64_t rows, int64_t cols, DType dtype, int64_t padding = 0,
                     unsigned seed = 0) {
  Sample s{kind, rows, cols, cols + padding, dtype, {}, {}};
  std::mt19937 generator(seed + 7919u * static_cast<unsigned>(rows * 31 + cols));
  std::normal_distribution<float> normal;
  s.values.resize(static_cast<size_t>(rows * s.stride));
  for (size_t i = 0; i < s.values.size(); ++i) {
    float& x = s.values[i];
    x = normal(generator);
    if (kind == "offset") x += 1000;
    if (kind == "constant") x = 0.75f;
    if (kind == "zero") x = i % 2 ? 0.0f : -0.0f;
    if (kind == "tails") x = std::exp(3 * x) * (i % 2 ? 1.0f : -1.0f);
    if (kind == "tiny") x *= 1e-41f;
    if (kind == "huge") x *= dtype == QTR_F16 ? 1e4f : 1e30f;
    if (kind == "outlier") x *= i == s.values.size() / 2 ? 1e4f : 1e-2f;
    if (kind == "ties") x = std::round(x * 2) / 2;
  }
  if (dtype != QTR_F32) {
    for (float& x : s.values) {
      s.bits.push_back(dtype == QTR_F16 ? f16_from_f32(x) : bf16_from_f32(x));
      x = dtype == QTR_F16 ? f32_from_f16(s.bits.back()) : f32_from_bf16(s.bits.back());
    }
  }
  return s;
}

inline const std::vector<std::string> kKinds = {"normal", "offset", "constant", "zero", "tails",
                                                "tiny",   "huge",   "outlier",  "ties"};
inline const std::vector<DType> kDTypes = {QTR_F32, QTR_F16, QTR_BF16};

// Runs body once for each target this CPU has and for one and three threads, and puts the settings back.
template <class Body>
void on_every_target(Body&& body) {
  const std::string before = target();
  const int threads_before = num_threads();
  for (const std::string& name : available_targets()) {
    for (int threads : {1, 3}) {
      SCOPED_TRACE("target " + name + ", threads " + std::to_string(threads));
      set_target(name);
      set_num_threads(threads);
      body();
    }
  }
  set_target(before);
  set_num_threads(threads_before);
}

// The result of body() on the reference kernels and one thread.
template <class Body>
auto on_reference(Body&& body) {
  const std::string before = target();
  const int threads_before = num_threads();
  set_target("reference");
  set_num_threads(1);
  auto result = body();
  set_target(before);
  set_num_threads(threads_before);
  return result;
}

// Of two vectors, one with a number that is not finite, the products of the other are finite; times(x, how)
// gives those of five rows of 600 columns.
template <class Times>
void expect_what_is_not_finite_to_spread(Times&& times) {
  for (float bad : {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()})
    for (int64_t col : {3, 599})
      for (qtr_activations how : {QTR_ACTIVATIONS_FLOAT32, QTR_ACTIVATIONS_INT8}) {
        Sample x = sample("normal", 2, 600, QTR_F32);
        x.values[static_cast<size_t>(600 + col)] = bad;
        on_every_target([&] {
          const std::vector<float> y = times(x, how);
          for (size_t row = 0; row < 5; ++row) {
            EXPECT_TRUE(std::isfinite(y[row]));
            EXPECT_FALSE(std::isfinite(y[5 + row]));
          }
        });
      }
}

}  // namespace quantrature::cases
