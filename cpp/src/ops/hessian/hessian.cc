#include "quantrature/hessian.hpp"

#include <algorithm>
#include <vector>

#include "common/check.hpp"
#include "common/float_rows.hpp"
#include "common/products.hpp"
#include "runtime/dispatch.hpp"
#include "runtime/thread_pool.hpp"

namespace quantrature {
namespace {

constexpr int64_t kChunk = 256;  // rows whose products are added before the sum is
constexpr int64_t kWidth = kTileFloats;

// A panel is kWidth columns of a chunk, as products want them on the right; zeros fill up the last one. Of it
// come four operands for the left.
struct Panels {
  int64_t count, rows = 0;
  std::vector<float> right, left;

  explicit Panels(int64_t cols)
      : count((cols + kWidth - 1) / kWidth),
        right(static_cast<size_t>(count * kWidth * kChunk)),
        left(right.size()) {}

  void load(const Matrix& x, int64_t first) {
    rows = std::min(kChunk, x.rows - first);
    parallel_for(count, [&](int64_t p) {
      const int64_t begin = p * kWidth, width = std::min(kWidth, x.cols - begin);
      float buffer[kWidth];
      for (int64_t t = 0; t < rows; ++t) {
        const float* from = float_row(x, first + t, begin, width, buffer);
        float* to = panel(right, p) + t * kWidth;
        std::copy_n(from, width, to);
        std::fill(to + width, to + kWidth, 0.0f);
        for (int64_t i = 0; i < kWidth; ++i)
          panel(left, p)[i / kTileRows * kTileRows * kChunk + t * kTileRows + i % kTileRows] = to[i];
      }
    });
  }

  static float* panel(std::vector<float>& of, int64_t p) { return of.data() + p * kWidth * kChunk; }
};

// Row panel of each tile of the lower triangle: p (p + 1) / 2 tiles come before row panel p.
struct Tile {
  int64_t row, col;
  explicit Tile(int64_t index) : row(0) {
    while ((row + 1) * (row + 2) / 2 <= index) ++row;
    col = index - row * (row + 1) / 2;
  }
};

}  // namespace

void hessian_accumulate(const HessianAccumulateArgs& a) {
  check_matrix(a.x, "hessian_accumulate", "x");
  check_matrix(a.sum, "hessian_accumulate", "sum");
  check(a.sum.dtype == QTR_F32, "[hessian_accumulate] sum must be float32", "dtype",
        static_cast<int>(a.sum.dtype));
  check(a.sum.rows == a.x.cols && a.sum.cols == a.x.cols,
        "[hessian_accumulate] sum must have a row and a column for each column of x", "rows", a.sum.rows,
        "cols", a.sum.cols, "expected", a.x.cols);
  Panels panels(a.x.cols);
  float* sum = static_cast<float*>(a.sum.data);
  const int64_t stride = a.sum.row_stride;
  for (int64_t first = 0; first < a.x.rows; first += kChunk) {
    panels.load(a.x, first);
    parallel_for(panels.count * (panels.count + 1) / 2, [&](int64_t index) {
      const Tile tile(index);
      float products[kWidth * kWidth] = {};
      for (int64_t i = 0; i < kWidth; i += kTileRows)
        kernels().products_f32(Panels::panel(panels.left, tile.row) + i * kChunk,
                               Panels::panel(panels.right, tile.col), kWidth, panels.rows,
                               products + i * kWidth, kWidth);
      const int64_t row = tile.row * kWidth, col = tile.col * kWidth;
      for (int64_t i = 0; i < std::min(kWidth, a.x.cols - row); ++i)
        for (int64_t j = 0; j < std::min(kWidth, a.x.cols - col); ++j) {
          if (col + j > row + i) continue;
          float& lower = sum[(row + i) * stride + col + j];
          lower += products[i * kWidth + j];
          sum[(col + j) * stride + row + i] = lower;
        }
    });
  }
}

}  // namespace quantrature
