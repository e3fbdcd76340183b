#include "quantrature/gguf.hpp"

#include <atomic>
#include <cmath>
#include <string>
#include <vector>

#include "common/check.hpp"
#include "common/float_rows.hpp"
#include "ops/gguf/fit.hpp"
#include "ops/gguf/layout.hpp"
#include "runtime/dispatch.hpp"
#include "runtime/thread_pool.hpp"

namespace quantrature {
namespace {

constexpr int64_t kNumbersOfFit = 2048;      // of a task
constexpr int64_t kNumbersOfDecode = 65536;  // of a task
constexpr float kLargest = 65504;            // of float16

// The names of the types, or of those with smaller blocks than `above`.
std::string names(int above = kGgufMostNumbers + 1) {
  std::string all;
  for (const GgufLayout& layout : kGgufLayouts)
    if (layout.info.block_size < above) all += (all.empty() ? "" : ", ") + std::string(layout.info.name);
  return all;
}

const GgufLayout& checked_layout(qtr_gguf_type type, int64_t cols) {
  const GgufLayout* layout = gguf_layout(type);
  if (layout == nullptr) [[unlikely]]
    check(false, ("[gguf] type must be that of " + names()).c_str(), "type", static_cast<int>(type));
  const int size = layout->info.block_size;
  if (cols < 1 || cols % size != 0) [[unlikely]] {
    std::string rule = std::string("[gguf] a matrix of type ") + layout->info.name +
                       " must have columns in blocks of " + std::to_string(size);
    if (cols > 0 && cols % 32 == 0) rule += "; choose another type (" + names(size) + ')';
    check(false, rule.c_str(), "cols", cols);
  }
  return *layout;
}

int64_t bytes_of_row(const GgufLayout& layout, int64_t cols) {
  return cols / layout.info.block_size * layout.info.block_bytes;
}

void check_data(const void* data, int64_t size, int64_t rows, int64_t row_bytes) {
  check_given(data != nullptr, "gguf", "data");
  check(size == rows * row_bytes, "[gguf] data must hold all blocks of all rows", "data_size", size,
        "expected", rows * row_bytes);
}

// The first number that is refused, counted over the matrix; and whether any weight is above 0.
struct Findings {
  std::atomic<int64_t> first;
  std::atomic<bool> any_weight{false};

  void add(int64_t place) {
    int64_t seen = first.load();
    while (place < seen && !first.compare_exchange_weak(seen, place)) {
    }
  }
};

// Whether all numbers of a block are finite and no larger than float16.
bool accepted(const float* x, int n) {
  bool all = true;
  for (int i = 0; i < n; ++i) all &= std::abs(x[i]) <= kLargest;
  return all;
}

// Whether all weights of a block are finite and not negative; `largest` is the largest of them.
bool accepted_weights(const float* weights, int n, float& largest) {
  bool all = true;
  largest = 0;
  for (int i = 0; i < n; ++i) {
    all &= weights[i] >= 0 && weights[i] < HUGE_VALF;
    largest = std::max(largest, weights[i]);
  }
  return all;
}

const float* weights_at(const Matrix& weights, int64_t row, int64_t col) {
  return static_cast<const float*>(weights.data) + (weights.rows > 1 ? row : 0) * weights.row_stride + col;
}

[[noreturn]] void refuse(const GgufQuantizeArgs& a, int64_t row, int64_t first, int n) {
  float buffer[kGgufMostNumbers];
  const float* x = float_row(a.w, row, first, n, buffer);
  for (int i = 0; i < n; ++i) {
    check(std::isfinite(x[i]), "[gguf] w must be finite", "value", x[i], "row", row, "col", first + i);
    check(std::abs(x[i]) <= kLargest, "[gguf] w must lie within -65504 and 65504, as scales are float16",
          "value", x[i], "row", row, "col", first + i);
  }
  const float* weights = weights_at(a.weights, row, first);
  for (int i = 0; i < n; ++i)
    check(std::isfinite(weights[i]) && weights[i] >= 0, "[gguf] weights must be finite and not negative",
          "weight", weights[i], "row", a.weights.rows > 1 ? row : 0, "col", first + i);
  throw Error("[gguf] a block was refused whose numbers are fit");
}

}  // namespace

int32_t gguf_type_count() {
  return static_cast<int32_t>(kGgufLayouts.size());
}

GgufTypeInfo gguf_type(int32_t i) {
  check(i >= 0 && i < gguf_type_count(), "[gguf] i must be from 0 to gguf_type_count() - 1", "i", i);
  return kGgufLayouts[static_cast<size_t>(i)].info;
}

int64_t gguf_row_bytes(qtr_gguf_type type, int64_t cols) {
  check_extent(1, cols, "gguf", "a row");
  return bytes_of_row(checked_layout(type, cols), cols);
}

void gguf_quantize(const GgufQuantizeArgs& a) {
  check_matrix(a.w, "gguf", "w");
  const GgufLayout& layout = checked_layout(a.type, a.w.cols);
  const int64_t row_bytes = bytes_of_row(layout, a.w.cols);
  check_data(a.data, a.data_size, a.w.rows, row_bytes);
  const bool weighted = a.weights.data != nullptr;
  if (weighted) {
    check_matrix(a.weights, "gguf", "weights");
    check(a.weights.cols == a.w.cols && (a.weights.rows == 1 || a.weights.rows == a.w.rows),
          "[gguf] weights must have the columns of w, and one row or the rows of w", "rows", a.weights.rows,
          "cols", a.weights.cols);
    check(a.weights.dtype == QTR_F32, "[gguf] weights must be float32", "dtype",
          static_cast<int>(a.weights.dtype));
  }

  const int size = layout.info.block_size;
  const int64_t of_row = a.w.cols / size, blocks = a.w.rows * of_row;
  Findings found{blocks};
  parallel_for_pieces(blocks, kNumbersOfFit / size, [&](int64_t begin, int64_t end) {
    float buffer[kGgufMostNumbers], ones[kGgufMostNumbers];
    std::fill_n(ones, size, 1.0f);
    GgufFit fit(layout);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t row = b / of_row, col = b % of_row * size;
      const float* x = float_row(a.w, row, col, size, buffer);
      const float* weights = weighted ? weights_at(a.weights, row, col) : ones;
      float largest = 0;
      if (!accepted(x, size) || !accepted_weights(weights, size, largest)) return found.add(b);
      if (largest > 0) found.any_weight.store(true, std::memory_order_relaxed);
      fit.fit(x, largest > 0 ? weights : ones, a.data + b * layout.info.block_bytes);
    }
  });
  const int64_t first = found.first.load();
  if (first < blocks) refuse(a, first / of_row, first % of_row * size, size);
  check(found.any_weight, "[gguf] weights must not all be 0", "largest", 0);
}

void gguf_dequantize(const GgufDequantizeArgs& a) {
  check_matrix(a.out, "gguf", "out");
  check(a.out.dtype == QTR_F32, "[gguf] out must be float32", "dtype", static_cast<int>(a.out.dtype));
  const GgufLayout& layout = checked_layout(a.type, a.out.cols);
  const int64_t row_bytes = bytes_of_row(layout, a.out.cols);
  check_data(a.data, a.data_size, a.out.rows, row_bytes);
  const int size = layout.info.block_size;
  const int64_t of_row = a.out.cols / size;
  parallel_for_pieces(a.out.rows * of_row, kNumbersOfDecode / size, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin, stop; b < end; b = stop) {
      const int64_t row = b / of_row, at = b % of_row;
      stop = std::min(end, b + of_row - at);
      kernels().gguf_decode(a.type, a.data + b * layout.info.block_bytes, stop - b,
                            static_cast<float*>(a.out.data) + row * a.out.row_stride + at * size);
    }
  });
}

}  // namespace quantrature
