#include "quantrature/kmeans.hpp"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "common/check.hpp"
#include "common/float_rows.hpp"
#include "common/ordered_key.hpp"
#include "ops/kmeans/sums.hpp"
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

// Sums over the numbers before each place, as KmeansSums has them.
class Prefixes {
 public:
  void resize(int64_t size) {
    for (std::vector<double>* sums : {&weight_, &first_, &second_}) sums->resize(at(size + 1 + kKmeansEnds));
  }

  void set(int64_t place, double weight, double first, double second) {
    weight_[at(place)] = weight, first_[at(place)] = first, second_[at(place)] = second;
  }

  void copy(const Prefixes& other, int64_t from, int64_t place) {
    set(place, other.weight_[at(from)], other.first_[at(from)], other.second_[at(from)]);
  }

  KmeansSums with(const double* best) const { return {weight_.data(), first_.data(), second_.data(), best}; }

 private:
  std::vector<double> weight_, first_, second_;
};

// The best ways to divide the first numbers into 1, 2, ... clusters, all of them.
class Layers {
 public:
  void fill(const Prefixes& prefixes, int64_t size, int clusters) {
    size_ = size;
    best_.resize(at(size + 1 + kKmeansEnds)), next_.resize(best_.size());
    split_.resize(at(clusters * (size + 1)));
    for (int64_t end = 1; end <= size; ++end) best_[at(end)] = kmeans_cost(prefixes.with(nullptr), 0, end);
    for (int c = 1; c < clusters; ++c) {
      sums_ = prefixes.with(best_.data());
      // The last layer is asked for all numbers alone.
      fill_layer(c, c + 1 < clusters ? c + 1 : size, size, c, size - 1);
      std::swap(best_, next_);
    }
  }

  // Where the last of c + 1 clusters of the first `end` numbers begins.
  int64_t split(int c, int64_t end) const { return split_[at(c * (size_ + 1) + end)]; }

 private:
  // Ends [low, high], whose last clusters begin within [first, last].
  void fill_layer(int c, int64_t low, int64_t high, int64_t first, int64_t last) {
    if (low > high) return;
    const int64_t end = low + (high - low) / 2;
    const int64_t begin = kernels().kmeans_begin(sums_, first, std::min(last, end - 1), end, &next_[at(end)]);
    split_[at(c * (size_ + 1) + end)] = static_cast<int32_t>(begin);
    fill_layer(c, low, end - 1, first, begin);
    fill_layer(c, end + 1, high, begin, last);
  }

  int64_t size_ = 0;
  std::vector<double> best_, next_;
  std::vector<int32_t> split_;
  KmeansSums sums_{};
};

// The best way to divide numbers into as many clusters as are worth a price each. If that comes to k of them,
// no other k are better, whatever the price was (Aggarwal, Schieber & Tokuyama 1994); and it takes no longer
// than a single layer.
class Priced {
 public:
  // The number of clusters.
  int divide(const Prefixes& prefixes, int64_t size, double price) {
    best_.resize(at(size + 1 + kKmeansEnds)), from_.resize(best_.size());
    sums_ = prefixes.with(best_.data());
    price_ = price;
    best_[0] = 0;
    from_[0] = 0;
    int64_t ends = 1;
    for (int64_t low = 1; low <= size; low += ends) {
      ends = known_ends(low, size, ends);
      const int64_t first = from_[at(low - 1)];
      const int64_t last = begin_of(low + ends - 1, first, low - 1);
      if (ends > 1) complete(low, low + ends, first, last);
    }
    int clusters = 0;
    for (int64_t end = size; end > 0; end = from_[at(end)]) ++clusters;
    cost_ = best_[at(size)] - clusters * price;
    return clusters;
  }

  // What the clusters cost, without their prices.
  double cost() const { return cost_; }

  // Where the last cluster of the first `end` numbers begins.
  int64_t split(int64_t end) const { return from_[at(end)]; }

 private:
  // How many ends from `low` on have no cluster that begins at low or later: as long as prolonging the last
  // cluster of the numbers before low costs less than a price, since more numbers never cost less. The search
  // starts where the last one ended.
  int64_t known_ends(int64_t low, int64_t size, int64_t ends) const {
    const int64_t begin = from_[at(low - 1)], most = size + 1 - low;
    const double limit = best_[at(low - 1)] - best_[at(begin)];
    const auto known = [&](int64_t count) {
      return count <= most && kmeans_cost(sums_, begin, low + count - 1) < limit;
    };
    if (!known(ends)) {
      do ends /= 2;
      while (ends > 1 && !known(ends));
      return std::max<int64_t>(ends, 1);
    }
    while (known(2 * ends)) ends *= 2;
    return ends;
  }

  // Ends [low, high), whose last clusters begin within [first, last]; later ends have later beginnings.
  void complete(int64_t low, int64_t high, int64_t first, int64_t last) {
    if (high - low <= kKmeansEnds) {
      // What is written beyond high is not known yet and is written again.
      kernels().kmeans_begins(sums_, first, last, low, price_, &best_[at(low)], &from_[at(low)]);
      return;
    }
    const int64_t middle = low + (high - low + kKmeansEnds) / (2 * kKmeansEnds) * kKmeansEnds;
    const int64_t begin = begin_of(middle - 1, first, last);
    complete(low, middle, first, begin);
    complete(middle, high, begin, last);
  }

  int64_t begin_of(int64_t end, int64_t first, int64_t last) {
    const int64_t begin = kernels().kmeans_begin(sums_, first, last, end, &best_[at(end)]);
    best_[at(end)] += price_;
    from_[at(end)] = static_cast<int32_t>(begin);
    return begin;
  }

  double price_ = 0, cost_ = 0;
  std::vector<double> best_;
  std::vector<int32_t> from_;
  KmeansSums sums_{};
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
    prefixes_.resize(cols), cell_prefixes_.resize(std::min<int64_t>(cols, kCells * k + 1));
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
    count_distinct();
    const int clusters = static_cast<int>(std::min<int64_t>(k_, size_));
    const bool priced = find_price(clusters);
    if (!priced) layers_.fill(prefixes_, size_, clusters);
    int64_t end = size_;
    for (int c = clusters - 1; c >= 0; --c) {
      const int64_t begin = c == 0 ? 0 : priced ? priced_.split(end) : layers_.split(c, end);
      centroids[c] = static_cast<float>(mean(begin, end));
      end = begin;
    }
    std::fill(centroids + clusters, centroids + k_, centroids[clusters - 1]);
    assign(centroids, assignment);
  }

 private:
  static constexpr uint32_t kInfinity = 0x7F800000u;
  static constexpr int kCells = 16;  // of a cluster, where a price is looked for
  static constexpr int kCellTries = 12;
  static constexpr int kTries = 8;

  void copy(const Matrix& m, int64_t row, std::vector<float>& to) const {
    const float* from = float_row(m, row, 0, cols_, to.data());
    if (from != to.data()) std::copy_n(from, cols_, to.data());
  }

  // The distinct numbers of positive weight, ascending, and their sums.
  void count_distinct() {
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
    size_ = last + 1;
    // From the middle outwards, around the number there: the sums of most numbers then know nothing of
    // extremes at the ends, in which their differences would drown.
    const int64_t middle = size_ / 2;
    middle_ = static_cast<double>(distinct[middle]);
    add_up(middle, size_, 1);
    add_up(middle, 0, -1);
  }

  // The sums from the middle, where they are 0, to `end`, which lies in the direction.
  void add_up(int64_t middle, int64_t end, int64_t direction) {
    double weight = 0, first = 0, second = 0;
    prefixes_.set(middle, 0, 0, 0);
    for (int64_t place = middle; place != end; place += direction) {
      const int64_t i = direction > 0 ? place : place - 1;
      const double w = static_cast<double>(direction) * mass_[at(i)], x = from_middle(i);
      weight += w, first += w * x, second += w * x * x;
      prefixes_.set(place + direction, weight, first, second);
    }
  }

  double from_middle(int64_t i) const { return static_cast<double>(distinct_[at(i)]) - middle_; }

  double mean(int64_t begin, int64_t end) const {
    const KmeansSums s = prefixes_.with(nullptr);
    double weight = s.weight[end] - s.weight[begin], first = s.first[end] - s.first[begin];
    if (weight > 0) return middle_ + first / weight;
    // The sums over far heavier numbers have lost these.
    weight = first = 0;
    for (int64_t i = begin; i < end; ++i) weight += mass_[at(i)], first += mass_[at(i)] * from_middle(i);
    return middle_ + first / weight;
  }

  // Numbers of clusters at some prices, and what the clusters cost then, fewer than wanted and more: more are
  // found below the one price and fewer above the other.
  struct Bracket {
    int few;
    double few_cost;
    int many;
    double many_cost;
    double low = 0, high = std::numeric_limits<double>::infinity();

    void take(int wanted, int found, double cost, double price) {
      if (found < wanted) few = found, few_cost = cost, high = price;
      if (found > wanted) many = found, many_cost = cost, low = price;
    }
    // At which both cost the same, prices included: then no other number is worse.
    double balance() const { return (few_cost - many_cost) / (many - few); }
    // Where `target` clusters are likely: their number goes with the price to the power -1/3.
    double guess(double price, int found, int target) const {
      const double ratio = static_cast<double>(found) / target, scaled = price * ratio * ratio * ratio;
      if (scaled > low && scaled < high) return scaled;
      return balance();
    }
  };

  // Whether priced_ came to so many clusters. The first price is one between what one cluster more would save
  // and one fewer would cost if clusters were made of cells of several numbers; there are k - 1 and k + 1
  // clusters at prices some 20 % off, so that it rarely needs a second.
  bool find_price(int clusters) {
    if (clusters < 2 || size_ < 4 * clusters) return false;
    const double all = kmeans_cost(prefixes_.with(nullptr), 0, size_);
    double price = 4 * all / (static_cast<double>(clusters) * clusters * clusters);
    const int64_t cells = size_ < 2 * kCells * clusters ? 0 : make_cells(kCells * clusters);
    if (cells > 2 * clusters) {
      Bracket b{1, kmeans_cost(cell_prefixes_.with(nullptr), 0, cells), static_cast<int>(cells), 0};
      for (int i = 0; i < kCellTries && b.many - b.few > 2; ++i) {
        const int found = priced_.divide(cell_prefixes_, cells, price);
        b.take(clusters, found, priced_.cost(), price);
        price = b.guess(price, found, b.few < clusters - 1 ? clusters - 1 : clusters + 1);
      }
      price = b.balance();
    }
    Bracket b{1, all, static_cast<int>(std::min<int64_t>(size_, INT32_MAX)), 0};
    for (int i = 0; i < kTries && price > b.low && price < b.high; ++i) {
      const int found = priced_.divide(prefixes_, size_, price);
      if (found == clusters) return true;
      b.take(clusters, found, priced_.cost(), price);
      price = b.guess(price, found, clusters);
    }
    return false;
  }

  // Divides the numbers into at most so many cells, half of them of as many numbers, half of them as wide,
  // and returns how many there are.
  int64_t make_cells(int64_t cells) {
    const double least = from_middle(0), width = from_middle(size_ - 1) - least;
    const double by_number = static_cast<double>(cells) / 2 / static_cast<double>(size_);
    const double by_width = static_cast<double>(cells) / 2 / width;
    int64_t made = 0;
    double next = 1;
    cell_prefixes_.copy(prefixes_, 0, 0);
    for (int64_t i = 1; i < size_; ++i) {
      const double passed = static_cast<double>(i) * by_number + (from_middle(i) - least) * by_width;
      if (passed < next) continue;
      cell_prefixes_.copy(prefixes_, i, ++made);
      next = std::floor(passed) + 1;
    }
    cell_prefixes_.copy(prefixes_, size_, ++made);
    return made;
  }

  void assign(const float* centroids, uint8_t* assignment) const {
    const size_t n = x_.size();
    size_t i = 0;
    for (int c = 0; i < n; ++c) {
      size_t end = n;
      if (c + 1 < k_) {
        const double near = static_cast<double>(centroids[c]), far = static_cast<double>(centroids[c + 1]);
        for (size_t begin = i; begin < end;) {
          const size_t half = begin + (end - begin) / 2;
          const double x = static_cast<double>(sorter_.value(half));
          if (std::abs(far - x) < std::abs(near - x))
            end = half;
          else
            begin = half + 1;
        }
      }
      for (; i < end; ++i) assignment[sorter_.position(i)] = static_cast<uint8_t>(c);
    }
  }

  int64_t cols_ = 0;
  int k_ = 0;
  int64_t size_ = 0;  // distinct numbers
  double middle_ = 0;
  std::vector<float> x_, weights_, distinct_;
  std::vector<double> mass_;
  Prefixes prefixes_, cell_prefixes_;
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
