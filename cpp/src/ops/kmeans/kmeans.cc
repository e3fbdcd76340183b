#include "quantrature/kmeans.hpp"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <utility>
#include <vector>

#include "common/check.hpp"
#include "common/float_rows.hpp"
#include "common/ordered_key.hpp"
#include "ops/kmeans/row.hpp"
#include "quantrature/runtime.hpp"
#include "runtime/backend.hpp"
#include "runtime/dispatch.hpp"
#include "runtime/thread_pool.hpp"

namespace quantrature {
namespace {

constexpr int64_t kTasksPerThread = 4;

size_t at(int64_t i) {
  return static_cast<size_t>(i);
}

// The searches of a row by the kernels of the CPU.
class Searches {
 public:
  int64_t begin(const KmeansSums& s, int64_t first, int64_t last, int64_t end, double* least) const {
    return kernels().kmeans_begin(s, first, last, end, least);
  }
  void begins(const KmeansSums& s, int64_t first, int64_t last, int64_t end, double price, double* least,
              int32_t* begins) const {
    kernels().kmeans_begins(s, first, last, end, price, least, begins);
  }
  int32_t* splits(int64_t count) {
    splits_.resize(at(count));
    return splits_.data();
  }

 private:
  std::vector<int32_t> splits_;
};

// Numbers in ascending order, equal ones in the order they are in: by the highest 22 bits in which their keys
// differ, in two passes; the few that are equal in those are sorted by comparing.
class Sorter {
 public:
  void sort(const std::vector<float>& x) {
    const size_t n = x.size();
    pairs_.resize(n), other_.resize(n);
    uint32_t low = ~0u, high = 0;
    for (size_t i = 0; i < n; ++i) {
      const uint32_t key = ordered_key(x[i]);
      low = std::min(low, key), high = std::max(high, key);
      pairs_[i] = uint64_t{key} << 32 | i;
    }
    int shift = 0;
    while ((high - low) >> shift >> (2 * kDigit) != 0) ++shift;
    by_digit(low, shift);
    by_digit(low, shift + kDigit);
    if (shift > 0) finish(low, shift);
  }

  // The position in x of the number that comes i-th.
  int64_t position(size_t i) const { return static_cast<int64_t>(pairs_[i] & 0xFFFFFFFFu); }
  float value(size_t i) const { return score_of_key(key_of(pairs_[i])); }

 private:
  static constexpr int kDigit = 11;

  static uint32_t key_of(uint64_t pair) { return static_cast<uint32_t>(pair >> 32); }

  void by_digit(uint32_t low, int shift) {
    const auto digit = [=](uint64_t pair) { return (key_of(pair) - low) >> shift & ((1u << kDigit) - 1); };
    uint32_t starts[1 << kDigit] = {};
    for (uint64_t pair : pairs_) ++starts[digit(pair)];
    uint32_t sum = 0;
    for (uint32_t& start : starts) sum += std::exchange(start, sum);
    uint64_t* to = other_.data();
    for (uint64_t pair : pairs_) to[starts[digit(pair)]++] = pair;
    std::swap(pairs_, other_);
  }

  void finish(uint32_t low, int shift) {
    for (size_t i = 0, next; i < pairs_.size(); i = next) {
      const uint32_t same = (key_of(pairs_[i]) - low) >> shift;
      next = i + 1;
      while (next < pairs_.size() && (key_of(pairs_[next]) - low) >> shift == same) ++next;
      if (next - i > 1) std::sort(&pairs_[i], &pairs_[i] + (next - i));
    }
  }

  std::vector<uint64_t> pairs_, other_;  // key and position
};

// One row at a time; the memory is kept from row to row.
class Row {
 public:
  void resize(int64_t cols, int k) {
    const size_t n = at(cols);
    cols_ = cols;
    k_ = k;
    x_.resize(n), weights_.resize(n), distinct_.resize(n), mass_.resize(n);
    const size_t places = at(kmeans_places(cols)), cells = at(kmeans_places(kmeans_most_cells(cols, k)));
    for (std::vector<double>& sums : sums_) sums.resize(places);
    for (std::vector<double>& sums : cell_sums_) sums.resize(cells);
    best_.resize(places), next_.resize(places), from_.resize(places);
  }

  // Returns whether all numbers are finite and all weights finite and not negative.
  bool load(const Matrix& x, const Matrix& weights, int64_t row) {
    copy(x, row, x_);
    uint32_t largest = 0;
    for (float value : x_) largest = std::max(largest, std::bit_cast<uint32_t>(value) & 0x7FFFFFFFu);
    if (largest >= kInfinity) return false;
    if (weights.data == nullptr) {
      std::fill(weights_.begin(), weights_.end(), 1.0f);
      return true;
    }
    copy(weights, row, weights_);
    largest = 0;
    for (float weight : weights_) largest = std::max(largest, std::bit_cast<uint32_t>(weight + 0.0f));
    if (largest >= kInfinity) return false;  // that has the sign of a negative one as its highest bit
    if (largest == 0) std::fill(weights_.begin(), weights_.end(), 1.0f);
    return true;
  }

  void solve(float* centroids, uint8_t* assignment) {
    const auto prefixes = [](std::vector<double>* of) {
      return KmeansPrefixes{of[0].data(), of[1].data(), of[2].data()};
    };
    const KmeansMemory memory{distinct_.data(), mass_.data(), prefixes(sums_), prefixes(cell_sums_),
                              best_.data(),     next_.data(), from_.data()};
    KmeansRow row(memory, searches_, count_distinct());
    row.add_up(1);
    row.add_up(-1);
    row.solve(k_, centroids);
    assign(centroids, assignment);
  }

 private:
  static constexpr uint32_t kInfinity = 0x7F800000u;

  void copy(const Matrix& m, int64_t row, std::vector<float>& to) const {
    const float* from = float_row(m, row, 0, cols_, to.data());
    if (from != to.data()) std::copy_n(from, cols_, to.data());
  }

  // The distinct numbers of positive weight, ascending, and their weights; returns how many there are.
  int64_t count_distinct() {
    sorter_.sort(x_);
    const float* weights = weights_.data();
    float* distinct = distinct_.data();
    double* mass = mass_.data();
    int64_t last = -1;
    double held = 0;
    for (size_t i = 0; i < x_.size(); ++i) {
      const float weight = weights[sorter_.position(i)];
      if (weight == 0) continue;
      const float value = sorter_.value(i);
      if (last < 0 || distinct[last] != value) {
        distinct[++last] = value;
        held = 0;
      }
      held += static_cast<double>(weight);
      mass[last] = held;
    }
    return last + 1;
  }

  void assign(const float* centroids, uint8_t* assignment) const {
    int64_t i = 0;
    for (int c = 0; i < cols_; ++c) {
      const int64_t end =
          c + 1 < k_ ? kmeans_end(centroids, c, i, cols_, [&](int64_t j) { return sorter_.value(at(j)); })
                     : cols_;
      for (; i < end; ++i) assignment[sorter_.position(at(i))] = static_cast<uint8_t>(c);
    }
  }

  int64_t cols_ = 0;
  int k_ = 0;
  std::vector<float> x_, weights_, distinct_;
  std::vector<double> mass_, sums_[3], cell_sums_[3], best_, next_;
  std::vector<int32_t> from_;
  Sorter sorter_;
  Searches searches_;
};

// Names the first number that load() refused.
void refuse(const KmeansArgs& a, int64_t row) {
  std::vector<float> buffer(static_cast<size_t>(a.x.cols));
  const float* x = float_row(a.x, row, 0, a.x.cols, buffer.data());
  for (int64_t col = 0; col < a.x.cols; ++col)
    check(std::isfinite(x[col]), "[kmeans] x must be finite", "value", x[col], "row", row, "column", col);
  const float* weights = float_row(a.weights, row, 0, a.x.cols, buffer.data());
  for (int64_t col = 0; col < a.x.cols; ++col)
    check(std::isfinite(weights[col]) && weights[col] >= 0,
          "[kmeans] weights must be finite and not negative", "weight", weights[col], "row", row, "column",
          col);
}

}  // namespace

void kmeans(const KmeansArgs& a) {
  check_matrix(a.x, "kmeans", "x");
  check(a.x.cols < INT32_MAX, "[kmeans] x must have fewer than 2^31 columns", "cols", a.x.cols);
  check(a.k >= 1 && a.k <= 256, "[kmeans] k must be 1 to 256", "k", a.k);
  if (a.weights.data != nullptr) {
    check_matrix(a.weights, "kmeans", "weights");
    check(a.weights.rows == a.x.rows && a.weights.cols == a.x.cols,
          "[kmeans] weights must have the shape of x", "rows", a.weights.rows, "cols", a.weights.cols);
  }
  check_matrix(a.centroids, "kmeans", "centroids");
  check(a.centroids.rows == a.x.rows && a.centroids.cols == a.k && a.centroids.dtype == QTR_F32,
        "[kmeans] centroids must be float32 of k for each row", "rows", a.centroids.rows, "cols",
        a.centroids.cols, "dtype", static_cast<int>(a.centroids.dtype));
  check_given(a.assignment != nullptr, "kmeans", "assignment");
  if (done_on_device(a, "kmeans", &qtr_backend::kmeans)) return;

  const int64_t tasks = std::min<int64_t>(a.x.rows, num_threads() * kTasksPerThread);
  std::atomic<int64_t> first_bad{a.x.rows};
  parallel_for(tasks, [&](int64_t task) {
    // A thread keeps its memory from call to call: to be given pages takes longer than to solve a row.
    thread_local Row solver;
    solver.resize(a.x.cols, a.k);
    for (int64_t row = a.x.rows * task / tasks; row < a.x.rows * (task + 1) / tasks; ++row) {
      if (solver.load(a.x, a.weights, row)) {
        solver.solve(static_cast<float*>(a.centroids.data) + row * a.centroids.row_stride,
                     a.assignment + row * a.x.cols);
        continue;
      }
      int64_t seen = first_bad.load();
      while (row < seen && !first_bad.compare_exchange_weak(seen, row)) {
      }
      return;
    }
  });
  if (first_bad.load() < a.x.rows) refuse(a, first_bad.load());
}

}  // namespace quantrature
