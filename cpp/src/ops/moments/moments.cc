#include "quantrature/moments.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "common/ceil_div.hpp"
#include "common/check.hpp"
#include "common/float_rows.hpp"
#include "ops/moments/merge.hpp"
#include "runtime/backend.hpp"
#include "runtime/dispatch.hpp"
#include "runtime/thread_pool.hpp"

namespace quantrature {
namespace {

constexpr int64_t kChunk = 4096;      // elements; the order of all sums depends on it
constexpr int64_t kColumnRows = 128;  // of one column kernel call; the order of all sums depends on it
constexpr int64_t kColumnTile =
    32;  // columns of one call: 16 KiB of float, which stays in the first-level cache
constexpr int64_t kTaskElements = 1 << 16;  // the order of the sum over a tensor depends on it

int64_t group_length(const MomentsArgs& a) {
  const int64_t length = a.over == QTR_OVER_COLUMNS ? a.x.rows : a.x.cols;
  return a.group_size == -1 ? length : std::min(a.group_size, length);
}

// Chunks are merged one after the other: the running error grows with their number, at 1e-16 a chunk.
Moments moments_of_run(const Matrix& x, int64_t row, int64_t begin, int64_t end) {
  float buffer[kChunk];
  Moments total{};
  for (int64_t at = begin; at < end; at += kChunk) {
    const int64_t n = std::min(kChunk, end - at);
    const Moments chunk = kernels().moments_of_chunk(float_row(x, row, at, n, buffer), n);
    total = at == begin ? chunk : merge_moments(total, chunk);
  }
  return total;
}

void over_tensor(const MomentsArgs& a) {
  const int64_t chunks = ceil_div(a.x.cols, kTaskElements);
  std::vector<Moments> parts(static_cast<size_t>(a.x.rows * chunks));
  const int64_t parts_of_task = std::max<int64_t>(1, kTaskElements / a.x.cols);
  parallel_for_pieces(a.x.rows * chunks, parts_of_task, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i % chunks * kTaskElements;
      parts[static_cast<size_t>(i)] =
          moments_of_run(a.x, i / chunks, begin, std::min(begin + kTaskElements, a.x.cols));
    }
  });
  Moments total = parts[0];
  for (size_t i = 1; i < parts.size(); ++i) total = merge_moments(total, parts[i]);
  *a.out = total;
}

void over_rows(const MomentsArgs& a, int64_t group) {
  const int64_t groups = ceil_div(a.x.cols, group);
  parallel_for_pieces(a.x.rows, std::max<int64_t>(1, kTaskElements / a.x.cols),
                      [&](int64_t begin, int64_t end) {
                        for (int64_t row = begin; row < end; ++row)
                          for (int64_t g = 0; g < groups; ++g)
                            a.out[row * groups + g] =
                                moments_of_run(a.x, row, g * group, std::min((g + 1) * group, a.x.cols));
                      });
}

// Rows are copied side by side first: in place, rows a power of two apart would evict each other from the
// cache between the two sweeps of the kernel.
void column_tile(const MomentsArgs& a, int64_t first_row, int64_t last_row, int64_t col, int64_t cols,
                 Moments* out) {
  float tile[kColumnRows * kColumnTile];
  Moments part[kColumnTile];
  for (int64_t row = first_row; row < last_row; row += kColumnRows) {
    const int64_t rows = std::min(kColumnRows, last_row - row);
    for (int64_t r = 0; r < rows; ++r) {
      float* copy = tile + r * cols;
      const float* source = float_row(a.x, row + r, col, cols, copy);
      if (source != copy) std::copy_n(source, cols, copy);
    }
    const bool first = row == first_row;
    kernels().moments_of_columns(tile, rows, cols, first ? out : part);
    if (!first)
      for (int64_t c = 0; c < cols; ++c) out[c] = merge_moments(out[c], part[c]);
  }
}

void over_columns(const MomentsArgs& a, int64_t group) {
  const int64_t tiles = ceil_div(a.x.cols, kColumnTile);
  parallel_for(ceil_div(a.x.rows, group) * tiles, [&](int64_t i) {
    const int64_t first_row = i / tiles * group;
    const int64_t col = i % tiles * kColumnTile;
    column_tile(a, first_row, std::min(first_row + group, a.x.rows), col,
                std::min(kColumnTile, a.x.cols - col), a.out + i / tiles * a.x.cols + col);
  });
}

}  // namespace

int64_t moments_count(const MomentsArgs& a) {
  check_matrix(a.x, "moments", "x");
  check(a.over >= QTR_OVER_TENSOR && a.over <= QTR_OVER_COLUMNS,
        "[moments] over must be tensor, rows or columns", "over", static_cast<int>(a.over));
  if (a.over == QTR_OVER_TENSOR) return 1;
  check(a.group_size == -1 || a.group_size >= 1, "[moments] group_size must be -1 or at least 1",
        "group_size", a.group_size);
  return a.over == QTR_OVER_ROWS ? a.x.rows * ceil_div(a.x.cols, group_length(a))
                                 : ceil_div(a.x.rows, group_length(a)) * a.x.cols;
}

void compute_moments(const MomentsArgs& a) {
  const int64_t count = moments_count(a);
  check_given(a.out != nullptr, "moments", "out");
  check(a.out_count == count, "[moments] out must hold one result for each set", "out_count", a.out_count,
        "expected", count);
  if (done_on_device(a, "moments", &qtr_backend::moments)) return;
  if (a.over == QTR_OVER_TENSOR) return over_tensor(a);
  if (a.over == QTR_OVER_ROWS) return over_rows(a, group_length(a));
  over_columns(a, group_length(a));
}

Moments merge_moments(const Moments& a, const Moments& b) {
  return merged(a, b);
}

double kurtosis(const Moments& m, bool fisher, bool bias) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const double n = m.count;
  const double variance = m.m2 / n;
  const double negligible = std::numeric_limits<double>::epsilon() * m.mean;
  if (!(variance > negligible * negligible)) return nan;
  double pearson = m.m4 / n / (variance * variance);
  if (!bias && n > 3) pearson = ((n * n - 1) * pearson - 3 * (n - 1) * (n - 1)) / ((n - 2) * (n - 3)) + 3;
  return fisher ? pearson - 3 : pearson;
}

}  // namespace quantrature
