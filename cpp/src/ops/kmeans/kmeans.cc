#include "quantrature/kmeans.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "common/check.hpp"
#include "common/float_rows.hpp"
#include "quantrature/runtime.hpp"
#include "runtime/thread_pool.hpp"

namespace quantrature {
namespace {

constexpr int64_t kTasksPerThread = 4;

// Sums over numbers before a place, less those over numbers before the middle: of weight, weight x and weight
// x^2.
struct Prefix {
  double weight, first, second;
};

// The least cost of numbers [begin, end) in one cluster: the sum of weight (x - mean)^2.
double cost(const Prefix& begin, const Prefix& end) {
  const double first = end.first - begin.first;
  return end.second - begin.second - first * first / (end.weight - begin.weight);
}

// One row at a time; the memory is kept from row to row.
class Row {
 public:
  Row(int64_t cols, int k) : cols_(cols), k_(k) {
    const auto n = static_cast<size_t>(cols), clusters = static_cast<size_t>(k);
    x_.resize(n), weights_.resize(n), order_.resize(n), distinct_.resize(n), mass_.resize(n),
        prefix_.resize(n + 1);
    best_.resize(n + 1), next_.resize(n + 1);
    split_.resize(clusters * (n + 1));
  }

  // Returns whether all numbers are finite and all weights finite and not negative.
  bool load(const Matrix& x, const Matrix& weights, int64_t row) {
    copy(x, row, x_);
    for (float value : x_)
      if (!std::isfinite(value)) return false;
    if (weights.data == nullptr) {
      std::fill(weights_.begin(), weights_.end(), 1.0f);
      return true;
    }
    copy(weights, row, weights_);
    bool any = false;
    for (float weight : weights_) {
      if (!std::isfinite(weight) || weight < 0) return false;
      any = any || weight > 0;
    }
    if (!any) std::fill(weights_.begin(), weights_.end(), 1.0f);
    return true;
  }

  void solve(float* centroids, uint8_t* assignment) {
    count_distinct();
    const int clusters = static_cast<int>(std::min<int64_t>(k_, size_));
    fill_table(clusters);
    int64_t end = size_;
    for (int c = clusters - 1; c >= 0; --c) {
      const int64_t begin = c == 0 ? 0 : split(c, end);
      const Prefix &from = prefix_[at(begin)], &to = prefix_[at(end)];
      centroids[c] = static_cast<float>(middle_ + (to.first - from.first) / (to.weight - from.weight));
      end = begin;
    }
    std::fill(centroids + clusters, centroids + k_, centroids[clusters - 1]);
    assign(centroids, assignment);
  }

 private:
  static size_t at(int64_t i) { return static_cast<size_t>(i); }
  int32_t& split(int cluster, int64_t end) { return split_[at(cluster * (cols_ + 1) + end)]; }

  void copy(const Matrix& m, int64_t row, std::vector<float>& to) const {
    const float* from = float_row(m, row, 0, cols_, to.data());
    if (from != to.data()) std::copy_n(from, cols_, to.data());
  }

  // The distinct numbers of positive weight, ascending, and their sums.
  void count_distinct() {
    std::iota(order_.begin(), order_.end(), 0);
    std::sort(order_.begin(), order_.end(), [this](int32_t a, int32_t b) {
      const float left = x_[at(a)], right = x_[at(b)];
      return left != right ? left < right : a < b;
    });
    size_ = 0;
    for (int32_t i : order_) {
      const float weight = weights_[at(i)];
      if (weight == 0) continue;
      if (size_ == 0 || distinct_[at(size_ - 1)] != x_[at(i)]) {
        distinct_[at(size_)] = x_[at(i)];
        mass_[at(size_)] = 0;
        ++size_;
      }
      mass_[at(size_ - 1)] += static_cast<double>(weight);
    }
    // From the middle outwards, around the number there: the sums of most numbers then know nothing of
    // extremes at the ends, in which their differences would drown.
    const int64_t middle = size_ / 2;
    middle_ = static_cast<double>(distinct_[at(middle)]);
    prefix_[at(middle)] = {};
    for (int64_t i = middle; i < size_; ++i) prefix_[at(i + 1)] = plus(prefix_[at(i)], i, 1);
    for (int64_t i = middle; i > 0; --i) prefix_[at(i - 1)] = plus(prefix_[at(i)], i - 1, -1);
  }

  Prefix plus(const Prefix& p, int64_t i, double sign) const {
    const double weight = sign * mass_[at(i)], x = static_cast<double>(distinct_[at(i)]) - middle_;
    return {p.weight + weight, p.first + weight * x, p.second + weight * x * x};
  }

  // best_[end] is the least cost of the first `end` numbers in c + 1 clusters, split(c, end) where the last
  // of them begins.
  void fill_table(int clusters) {
    for (int64_t end = 1; end <= size_; ++end) best_[at(end)] = cost(prefix_[0], prefix_[at(end)]);
    for (int c = 1; c < clusters; ++c) {
      // The last layer is asked for all numbers alone.
      fill_layer(c, c + 1 < clusters ? c + 1 : size_, size_, c, size_ - 1);
      std::swap(best_, next_);
    }
  }

  // Ends [low, high], whose last clusters begin within [first, last].
  void fill_layer(int c, int64_t low, int64_t high, int64_t first, int64_t last) {
    if (low > high) return;
    const int64_t end = low + (high - low) / 2;
    double least = std::numeric_limits<double>::infinity();
    int64_t least_at = first;
    for (int64_t begin = first; begin <= std::min(last, end - 1); ++begin) {
      const double sum = best_[at(begin)] + cost(prefix_[at(begin)], prefix_[at(end)]);
      if (sum < least) least = sum, least_at = begin;
    }
    next_[at(end)] = least;
    split(c, end) = static_cast<int32_t>(least_at);
    fill_layer(c, low, end - 1, first, least_at);
    fill_layer(c, end + 1, high, least_at, last);
  }

  void assign(const float* centroids, uint8_t* assignment) const {
    int nearest = 0;
    for (int32_t i : order_) {
      const double x = static_cast<double>(x_[at(i)]);
      while (nearest + 1 < k_ && std::abs(static_cast<double>(centroids[nearest + 1]) - x) <
                                     std::abs(static_cast<double>(centroids[nearest]) - x))
        ++nearest;
      assignment[i] = static_cast<uint8_t>(nearest);
    }
  }

  int64_t cols_;
  int k_;
  int64_t size_ = 0;  // distinct numbers
  double middle_ = 0;
  std::vector<float> x_, weights_, distinct_;
  std::vector<int32_t> order_, split_;
  std::vector<Prefix> prefix_;
  std::vector<double> mass_, best_, next_;
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
  check(a.assignment != nullptr, "[kmeans] assignment must not be null");

  const int64_t tasks = std::min<int64_t>(a.x.rows, num_threads() * kTasksPerThread);
  std::vector<Row> solvers(static_cast<size_t>(tasks), Row(a.x.cols, a.k));
  std::atomic<int64_t> first_bad{a.x.rows};
  parallel_for(tasks, [&](int64_t task) {
    Row& solver = solvers[static_cast<size_t>(task)];
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
