#include "quantrature/kmeans.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "common/check.hpp"
#include "common/float_rows.hpp"
#include "common/ordered_key.hpp"
#include "quantrature/runtime.hpp"
#include "runtime/backend.hpp"
#include "runtime/thread_pool.hpp"

namespace quantrature {
namespace {

constexpr int64_t kTasksPerThread = 4;

size_t at(int64_t i) {
  return static_cast<size_t>(i);
}

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

// The best ways to divide the first numbers into 1, 2, ... clusters, all of them.
class Layers {
 public:
  void fill(const std::vector<Prefix>& prefix, int64_t size, int clusters) {
    prefix_ = prefix.data();
    size_ = size;
    costs_.clear();
    best_.resize(at(size + 1)), next_.resize(at(size + 1));
    split_.resize(at(clusters * (size + 1)));
    for (int64_t end = 1; end <= size; ++end) best_[at(end)] = cost(prefix_[0], prefix_[end]);
    costs_.push_back(best_[at(size)]);
    for (int c = 1; c < clusters; ++c) {
      // The last layer is asked for all numbers alone.
      fill_layer(c, c + 1 < clusters ? c + 1 : size, size, c, size - 1);
      std::swap(best_, next_);
      costs_.push_back(best_[at(size)]);
    }
  }

  // Where the last of c + 1 clusters of the first `end` numbers begins.
  int64_t split(int c, int64_t end) const { return split_[at(c * (size_ + 1) + end)]; }

  // The least cost of all numbers in so many clusters.
  double cost_of(int clusters) const { return costs_[at(clusters - 1)]; }

 private:
  // Ends [low, high], whose last clusters begin within [first, last].
  void fill_layer(int c, int64_t low, int64_t high, int64_t first, int64_t last) {
    if (low > high) return;
    const int64_t end = low + (high - low) / 2;
    double least = std::numeric_limits<double>::infinity();
    int64_t least_at = first;
    for (int64_t begin = first; begin <= std::min(last, end - 1); ++begin) {
      const double sum = best_[at(begin)] + cost(prefix_[begin], prefix_[end]);
      if (sum < least) least = sum, least_at = begin;
    }
    next_[at(end)] = least;
    split_[at(c * (size_ + 1) + end)] = static_cast<int32_t>(least_at);
    fill_layer(c, low, end - 1, first, least_at);
    fill_layer(c, end + 1, high, least_at, last);
  }

  const Prefix* prefix_ = nullptr;
  int64_t size_ = 0;
  std::vector<double> best_, next_, costs_;
  std::vector<int32_t> split_;
};

// The best way to divide numbers into as many clusters as are worth a price each. If that comes to k of them,
// no other k are better, whatever the price was; and it takes no longer than a single layer or two.
class Priced {
 public:
  // The number of clusters.
  int divide(const std::vector<Prefix>& prefix, int64_t size, double price) {
    prefix_ = prefix.data();
    price_ = price;
    best_.assign(at(size + 1), std::numeric_limits<double>::infinity());
    from_.resize(at(size + 1));
    best_[0] = 0;
    from_[0] = 0;
    complete(0, size + 1);
    int clusters = 0;
    for (int64_t end = size; end > 0; end = from_[at(end)]) ++clusters;
    return clusters;
  }

  // Where the last cluster of the first `end` numbers begins.
  int64_t split(int64_t end) const { return from_[at(end)]; }

 private:
  static constexpr int64_t kFew = 8;

  // Ends [low, high), of which clusters that begin before low have been tried.
  void complete(int64_t low, int64_t high) {
    if (high - low <= kFew) {
      for (int64_t end = low + 1; end < high; ++end)
        for (int64_t begin = low; begin < end; ++begin) try_cluster(begin, end);
      return;
    }
    const int64_t middle = low + (high - low) / 2;
    complete(low, middle);
    // Later ends have later beginnings.
    extend(middle, high - 1, std::max<int64_t>(low, from_[at(middle - 1)]), middle - 1);
    complete(middle, high);
  }

  // Tries clusters that begin within [first, last] on ends [low, high], all behind last.
  void extend(int64_t low, int64_t high, int64_t first, int64_t last) {
    if (low > high) return;
    const int64_t end = low + (high - low) / 2;
    double least = std::numeric_limits<double>::infinity();
    int64_t least_at = first;
    for (int64_t begin = first; begin <= last; ++begin) {
      const double sum = best_[at(begin)] + cost(prefix_[begin], prefix_[end]);
      if (sum < least) least = sum, least_at = begin;
    }
    if (least + price_ < best_[at(end)]) {
      best_[at(end)] = least + price_;
      from_[at(end)] = static_cast<int32_t>(least_at);
    }
    extend(low, end - 1, first, least_at);
    extend(end + 1, high, least_at, last);
  }

  void try_cluster(int64_t begin, int64_t end) {
    const double sum = best_[at(begin)] + cost(prefix_[begin], prefix_[end]) + price_;
    if (sum < best_[at(end)]) {
      best_[at(end)] = sum;
      from_[at(end)] = static_cast<int32_t>(begin);
    }
  }

  const Prefix* prefix_ = nullptr;
  double price_ = 0;
  std::vector<double> best_;
  std::vector<int32_t> from_;
};

// Positions of x in ascending order, of equal numbers in the order they are in.
class Sorter {
 public:
  const std::vector<int32_t>& sort(const std::vector<float>& x) {
    keys_.resize(x.size()), other_keys_.resize(x.size()), order_.resize(x.size()), other_.resize(x.size());
    for (size_t i = 0; i < x.size(); ++i) keys_[i] = ordered_key(x[i]);
    std::iota(order_.begin(), order_.end(), 0);
    for (int shift = 0; shift < 32; shift += kDigit) by_digit(shift);
    return order_;
  }

 private:
  static constexpr int kDigit = 11;

  void by_digit(int shift) {
    size_t starts[1 << kDigit] = {};
    const auto digit = [&](uint32_t key) { return key >> shift & ((1u << kDigit) - 1); };
    for (uint32_t key : keys_) ++starts[digit(key)];
    size_t sum = 0;
    for (size_t& start : starts) sum += std::exchange(start, sum);
    for (size_t i = 0; i < keys_.size(); ++i) {
      const size_t to = starts[digit(keys_[i])]++;
      other_keys_[to] = keys_[i];
      other_[to] = order_[i];
    }
    std::swap(keys_, other_keys_);
    std::swap(order_, other_);
  }

  std::vector<uint32_t> keys_, other_keys_;
  std::vector<int32_t> order_, other_;
};

// One row at a time; the memory is kept from row to row.
class Row {
 public:
  Row(int64_t cols, int k) : cols_(cols), k_(k) {
    const size_t n = at(cols);
    x_.resize(n), weights_.resize(n), distinct_.resize(n), mass_.resize(n), prefix_.resize(n + 1);
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
    const bool priced = find_price(clusters);
    if (!priced) layers_.fill(prefix_, size_, clusters);
    int64_t end = size_;
    for (int c = clusters - 1; c >= 0; --c) {
      const int64_t begin = c == 0 ? 0 : priced ? priced_.split(end) : layers_.split(c, end);
      const Prefix &from = prefix_[at(begin)], &to = prefix_[at(end)];
      centroids[c] = static_cast<float>(middle_ + (to.first - from.first) / (to.weight - from.weight));
      end = begin;
    }
    std::fill(centroids + clusters, centroids + k_, centroids[clusters - 1]);
    assign(centroids, assignment);
  }

 private:
  static constexpr int kCells = 16;  // of a cluster, where a price is looked for
  static constexpr int kTries = 5;

  void copy(const Matrix& m, int64_t row, std::vector<float>& to) const {
    const float* from = float_row(m, row, 0, cols_, to.data());
    if (from != to.data()) std::copy_n(from, cols_, to.data());
  }

  // The distinct numbers of positive weight, ascending, and their sums.
  void count_distinct() {
    order_ = &sorter_.sort(x_);
    size_ = 0;
    for (int32_t i : *order_) {
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

  // Whether priced_ came to so many clusters. The first price lies between what one cluster more would save
  // and one fewer would cost if clusters were made of cells of several numbers; there are k - 1 and k + 1
  // clusters at prices some 20 % off, so that it rarely needs a second, and then the number goes with the
  // price to the power -1/3.
  bool find_price(int clusters) {
    const int64_t cells = int64_t{kCells} * clusters;
    if (clusters < 2 || size_ < 2 * cells) return false;
    cell_prefix_.resize(at(cells + 1));
    for (int64_t i = 0; i <= cells; ++i) cell_prefix_[at(i)] = prefix_[at(i * size_ / cells)];
    layers_.fill(cell_prefix_, cells, clusters + 1);
    double price = (layers_.cost_of(clusters - 1) - layers_.cost_of(clusters + 1)) / 2;
    double low = 0, high = std::numeric_limits<double>::infinity();
    for (int i = 0; i < kTries && price > low && price < high; ++i) {
      const int found = priced_.divide(prefix_, size_, price);
      if (found == clusters) return true;
      (found > clusters ? low : high) = price;
      const double ratio = static_cast<double>(found) / clusters;
      price *= ratio * ratio * ratio;
      if (!(price > low && price < high)) price = low + (high - low) / 2;
    }
    return false;
  }

  void assign(const float* centroids, uint8_t* assignment) const {
    int nearest = 0;
    for (int32_t i : *order_) {
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
  std::vector<double> mass_;
  std::vector<Prefix> prefix_, cell_prefix_;
  const std::vector<int32_t>* order_ = nullptr;
  Sorter sorter_;
  Layers layers_;
  Priced priced_;
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
  check_on_cpu(a.device, "kmeans");
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
