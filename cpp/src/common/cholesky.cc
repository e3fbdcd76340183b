#include "common/cholesky.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/products.hpp"
#include "runtime/dispatch.hpp"
#include "runtime/thread_pool.hpp"

namespace quantrature {
namespace {

constexpr int64_t kBlock = kCholeskyBlock;

// Of a block on the diagonal, kBlock x kBlock; rows below in the order of columns.
bool factor(double* a, int64_t n) {
  for (int64_t j = 0; j < kBlock; ++j) {
    double pivot = a[j * n + j];
    for (int64_t k = 0; k < j; ++k) pivot -= a[j * n + k] * a[j * n + k];
    if (!(pivot > 0) || !std::isfinite(pivot)) return false;
    const double root = std::sqrt(pivot);
    a[j * n + j] = root;
    for (int64_t i = j + 1; i < kBlock; ++i) {
      double sum = a[i * n + j];
      for (int64_t k = 0; k < j; ++k) sum -= a[i * n + k] * a[j * n + k];
      a[i * n + j] = sum / root;
    }
  }
  return true;
}

// Columns [begin, begin + kTileDoubles) of panel, which has the rows below a block as its columns: solves
// L x = panel, by eight unknowns at a time. minus_l has -L below the diagonal, its columns eight rows wide.
void solve(const double* l, int64_t n, const std::vector<double>& minus_l, double* panel, int64_t stride) {
  for (int64_t first = 0; first < kBlock; first += kTileRows) {
    double* rows = panel + first * stride;
    kernels().products_f64(minus_l.data() + first * kBlock, panel, stride, first, rows, stride);
    for (int64_t i = 0; i < kTileRows; ++i) {
      const double* factors = l + (first + i) * n + first;
      for (int64_t k = 0; k < i; ++k)
        for (int64_t j = 0; j < kTileDoubles; ++j) rows[i * stride + j] -= factors[k] * rows[k * stride + j];
      for (int64_t j = 0; j < kTileDoubles; ++j) rows[i * stride + j] /= factors[i];
    }
  }
}

}  // namespace

bool cholesky(double* a, int64_t n) {
  std::vector<double> panel, minus_l(static_cast<size_t>(kBlock * kBlock));
  for (int64_t at = 0; at < n; at += kBlock) {
    double* corner = a + at * n + at;
    if (!factor(corner, n)) return false;
    const int64_t below = n - at - kBlock;
    if (below == 0) break;
    for (int64_t first = 0; first < kBlock; first += kTileRows)
      for (int64_t k = 0; k < kBlock; ++k)
        for (int64_t i = 0; i < kTileRows; ++i)
          minus_l[static_cast<size_t>(first * kBlock + k * kTileRows + i)] = -corner[(first + i) * n + k];
    panel.resize(static_cast<size_t>(kBlock * below));
    double* rows = corner + kBlock * n;
    parallel_for_pieces(below, kTileDoubles, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j)
        for (int64_t k = 0; k < kBlock; ++k) panel[static_cast<size_t>(k * below + j)] = rows[j * n + k];
      solve(corner, n, minus_l, panel.data() + begin, below);
      for (int64_t j = begin; j < end; ++j)
        for (int64_t k = 0; k < kBlock; ++k) rows[j * n + k] = panel[static_cast<size_t>(k * below + j)];
    });
    parallel_for_pieces(below, kTileDoubles, [&](int64_t begin, int64_t end) {
      double minus[kBlock * kTileRows];
      for (int64_t i = begin; i < end; i += kTileRows) {
        for (int64_t k = 0; k < kBlock; ++k)
          for (int64_t r = 0; r < kTileRows; ++r)
            minus[k * kTileRows + r] = -panel[static_cast<size_t>(k * below + i + r)];
        for (int64_t j = 0; j < end; j += kTileDoubles)
          kernels().products_f64(minus, panel.data() + j, below, kBlock, rows + i * n + kBlock + j, n);
      }
    });
  }
  return true;
}

}  // namespace quantrature
