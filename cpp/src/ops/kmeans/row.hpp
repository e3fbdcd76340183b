// The search for the centroids of one row, on the CPU and on devices: everything but sorting, which either
// does in its own way, and the two searches for where a cluster begins, which a row is given as `Search`:
//
//   int64_t begin(sums, first, last, end, &least)                 kmeans_begin of kernels.inc
//   void begins(sums, first, last, end, price, least, begins)     kmeans_begins
//   int32_t* splits(count)                                        memory for as many
//
// On a device the threads of a warp all do the same, and Search divides its work among them: what they write
// is the same, too.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>

#include "ops/kmeans/sums.hpp"

#ifdef __CUDACC__
#define QUANTRATURE_KMEANS __device__ inline
#else
#define QUANTRATURE_KMEANS inline
#endif

namespace quantrature {

inline constexpr int kKmeansCells = 16;       // of a cluster, where a price is looked for
inline constexpr int kKmeansMostPieces = 40;  // of halving 2^31 numbers

// Memory for sums over the numbers before each place, as KmeansSums has them.
struct KmeansPrefixes {
  double* weight;
  double* first;
  double* second;

  QUANTRATURE_KMEANS void set(int64_t place, double w, double f, double s) const {
    weight[place] = w, first[place] = f, second[place] = s;
  }
  QUANTRATURE_KMEANS void copy(const KmeansPrefixes& other, int64_t from, int64_t place) const {
    set(place, other.weight[from], other.first[from], other.second[from]);
  }
  QUANTRATURE_KMEANS KmeansSums with(const double* best) const { return {weight, first, second, best}; }
};

// How many places sums over so many numbers have.
inline int64_t kmeans_places(int64_t numbers) {
  return numbers + 1 + kKmeansEnds;
}

inline int64_t kmeans_most_cells(int64_t numbers, int k) {
  return std::min<int64_t>(numbers, int64_t{kKmeansCells} * k + 1);
}

// Memory of a row.
struct KmeansMemory {
  float* distinct;  // of positive weight, ascending
  double* mass;     // their weights
  KmeansPrefixes numbers, cells;
  double* best;  // kmeans_places of the numbers each
  double* next;
  int32_t* from;
};

// The best ways to divide the first numbers into 1, 2, ... clusters, all of them.
template <class Search>
class KmeansLayers {
 public:
  QUANTRATURE_KMEANS KmeansLayers(const KmeansMemory& m, Search& search, int64_t size, int clusters)
      : search_(search), size_(size), next_(m.next), split_(search.splits(clusters * (size + 1))) {
    double* best = m.best;
    for (int64_t end = 1; end <= size; ++end) best[end] = kmeans_cost(m.numbers.with(nullptr), 0, end);
    for (int c = 1; c < clusters; ++c) {
      // The last layer is asked for all numbers alone.
      fill_layer(m.numbers.with(best), c, c + 1 < clusters ? c + 1 : size, size, c, size - 1);
      double* filled = next_;
      next_ = best, best = filled;
    }
  }

  // Where the last of c + 1 clusters of the first `end` numbers begins.
  QUANTRATURE_KMEANS int64_t split(int c, int64_t end) const { return split_[c * (size_ + 1) + end]; }

 private:
  // Ends [low, high], whose last clusters begin within [first, last]. What waits begins behind the piece in
  // hand.
  QUANTRATURE_KMEANS void fill_layer(const KmeansSums& sums, int c, int64_t low, int64_t high, int64_t first,
                                     int64_t last) {
    int64_t waiting_high[kKmeansMostPieces], waiting_last[kKmeansMostPieces];
    int count = 0;
    while (true) {
      while (low <= high) {
        const int64_t end = low + (high - low) / 2;
        double least;
        const int64_t begin = search_.begin(sums, first, last < end - 1 ? last : end - 1, end, &least);
        next_[end] = least;
        split_[c * (size_ + 1) + end] = static_cast<int32_t>(begin);
        waiting_high[count] = high, waiting_last[count] = last, ++count;
        high = end - 1, last = begin;
      }
      if (count == 0) return;
      --count;
      low = high + 2, first = last;
      high = waiting_high[count], last = waiting_last[count];
    }
  }

  Search& search_;
  int64_t size_;
  double* next_;
  int32_t* split_;
};

// The best way to divide numbers into as many clusters as are worth a price each. If that comes to k of them,
// no other k are better, whatever the price was (Aggarwal, Schieber & Tokuyama 1994); and it takes no longer
// than a single layer.
template <class Search>
class KmeansPriced {
 public:
  QUANTRATURE_KMEANS KmeansPriced(const KmeansMemory& m, Search& search)
      : search_(search), best_(m.best), from_(m.from) {}

  // The number of clusters.
  QUANTRATURE_KMEANS int divide(const KmeansPrefixes& prefixes, int64_t size, double price) {
    sums_ = prefixes.with(best_);
    price_ = price;
    best_[0] = 0;
    from_[0] = 0;
    int64_t ends = 1;
    for (int64_t low = 1; low <= size; low += ends) {
      ends = known_ends(low, size, ends);
      const int64_t first = from_[low - 1];
      const int64_t last = begin_of(low + ends - 1, first, low - 1);
      if (ends > 1) complete(low, low + ends, first, last);
    }
    int clusters = 0;
    for (int64_t end = size; end > 0; end = from_[end]) ++clusters;
    cost_ = best_[size] - clusters * price;
    return clusters;
  }

  // What the clusters cost, without their prices.
  QUANTRATURE_KMEANS double cost() const { return cost_; }

  // Where the last cluster of the first `end` numbers begins.
  QUANTRATURE_KMEANS int64_t split(int64_t end) const { return from_[end]; }

 private:
  // How many ends from `low` on have no cluster that begins at low or later: as long as prolonging the last
  // cluster of the numbers before low costs less than a price, since more numbers never cost less. The search
  // starts where the last one ended.
  QUANTRATURE_KMEANS int64_t known_ends(int64_t low, int64_t size, int64_t ends) const {
    const int64_t begin = from_[low - 1], most = size + 1 - low;
    const double limit = best_[low - 1] - best_[begin];
    const auto known = [&](int64_t count) {
      return count <= most && kmeans_cost(sums_, begin, low + count - 1) < limit;
    };
    if (!known(ends)) {
      do ends /= 2;
      while (ends > 1 && !known(ends));
      return ends > 1 ? ends : 1;
    }
    while (known(2 * ends)) ends *= 2;
    return ends;
  }

  // Ends [low, high), whose last clusters begin within [first, last]; later ends have later beginnings. What
  // waits begins where the piece in hand ends.
  QUANTRATURE_KMEANS void complete(int64_t low, int64_t high, int64_t first, int64_t last) {
    int64_t waiting_high[kKmeansMostPieces], waiting_last[kKmeansMostPieces];
    int count = 0;
    while (true) {
      while (high - low > kKmeansEnds) {
        waiting_high[count] = high, waiting_last[count] = last, ++count;
        high = low + (high - low + kKmeansEnds) / (2 * kKmeansEnds) * kKmeansEnds;
        last = begin_of(high - 1, first, last);
      }
      // What is written beyond high is not known yet and is written again.
      search_.begins(sums_, first, last, low, price_, &best_[low], &from_[low]);
      if (count == 0) return;
      --count;
      low = high, first = last;
      high = waiting_high[count], last = waiting_last[count];
    }
  }

  QUANTRATURE_KMEANS int64_t begin_of(int64_t end, int64_t first, int64_t last) {
    double least;
    const int64_t begin = search_.begin(sums_, first, last, end, &least);
    best_[end] = least + price_;
    from_[end] = static_cast<int32_t>(begin);
    return begin;
  }

  Search& search_;
  double price_ = 0, cost_ = 0;
  double* best_;
  int32_t* from_;
  KmeansSums sums_{};
};

// Numbers of clusters at some prices, and what the clusters cost then, fewer than wanted and more: more are
// found below the one price and fewer above the other.
struct KmeansBracket {
  int few;
  double few_cost;
  int many;
  double many_cost;
  double low = 0, high = std::numeric_limits<double>::infinity();

  QUANTRATURE_KMEANS void take(int wanted, int found, double cost, double price) {
    if (found < wanted) few = found, few_cost = cost, high = price;
    if (found > wanted) many = found, many_cost = cost, low = price;
  }
  // At which both cost the same, prices included: then no other number is worse.
  QUANTRATURE_KMEANS double balance() const { return (few_cost - many_cost) / (many - few); }
  // Where `target` clusters are likely: their number goes with the price to the power -1/3.
  QUANTRATURE_KMEANS double guess(double price, int found, int target) const {
    const double ratio = static_cast<double>(found) / target, scaled = price * ratio * ratio * ratio;
    if (scaled > low && scaled < high) return scaled;
    return balance();
  }
};

// A row whose distinct numbers and their weights are in its memory.
template <class Search>
class KmeansRow {
 public:
  QUANTRATURE_KMEANS KmeansRow(const KmeansMemory& m, Search& search, int64_t size)
      : m_(m),
        search_(search),
        priced_(m, search),
        size_(size),
        middle_(static_cast<double>(m.distinct[size / 2])) {}

  // The sums from the middle outwards, to the end in a direction, 1 or -1, around the number there: the sums
  // of most numbers then know nothing of extremes at the ends, in which their differences would drown.
  QUANTRATURE_KMEANS void add_up(int64_t direction) const {
    double weight = 0, first = 0, second = 0;
    const int64_t middle = size_ / 2, end = direction > 0 ? size_ : 0;
    m_.numbers.set(middle, 0, 0, 0);
    for (int64_t place = middle; place != end; place += direction) {
      const int64_t i = direction > 0 ? place : place - 1;
      const double w = static_cast<double>(direction) * m_.mass[i], x = from_middle(i);
      weight += w, first += w * x, second += w * x * x;
      m_.numbers.set(place + direction, weight, first, second);
    }
  }

  // Writes k centroids.
  QUANTRATURE_KMEANS void solve(int k, float* centroids) {
    const int clusters = static_cast<int>(size_ < k ? size_ : k);
    if (find_price(clusters)) {
      write(clusters, centroids, [&](int, int64_t end) { return priced_.split(end); });
    } else {
      const KmeansLayers<Search> layers(m_, search_, size_, clusters);
      write(clusters, centroids, [&](int c, int64_t end) { return layers.split(c, end); });
    }
    for (int c = clusters; c < k; ++c) centroids[c] = centroids[clusters - 1];
  }

 private:
  static constexpr int kCellTries = 12;
  static constexpr int kTries = 8;

  template <class Split>
  QUANTRATURE_KMEANS void write(int clusters, float* centroids, const Split& split) const {
    int64_t end = size_;
    for (int c = clusters - 1; c >= 0; --c) {
      const int64_t begin = c == 0 ? 0 : split(c, end);
      centroids[c] = static_cast<float>(mean(begin, end));
      end = begin;
    }
  }

  QUANTRATURE_KMEANS double from_middle(int64_t i) const {
    return static_cast<double>(m_.distinct[i]) - middle_;
  }

  QUANTRATURE_KMEANS double mean(int64_t begin, int64_t end) const {
    const KmeansPrefixes& s = m_.numbers;
    double weight = s.weight[end] - s.weight[begin], first = s.first[end] - s.first[begin];
    if (weight > 0) return middle_ + first / weight;
    // The sums over far heavier numbers have lost these.
    weight = first = 0;
    for (int64_t i = begin; i < end; ++i) weight += m_.mass[i], first += m_.mass[i] * from_middle(i);
    return middle_ + first / weight;
  }

  // Whether priced_ came to so many clusters. The first price is one between what one cluster more would save
  // and one fewer would cost if clusters were made of cells of several numbers; there are k - 1 and k + 1
  // clusters at prices some 20 % off, so that it rarely needs a second.
  QUANTRATURE_KMEANS bool find_price(int clusters) {
    if (clusters < 2 || size_ < 4 * clusters) return false;
    const double all = kmeans_cost(m_.numbers.with(nullptr), 0, size_);
    double price = 4 * all / (static_cast<double>(clusters) * clusters * clusters);
    const int64_t cells = size_ < 2 * kKmeansCells * clusters ? 0 : make_cells(kKmeansCells * clusters);
    if (cells > 2 * clusters) {
      KmeansBracket b{1, kmeans_cost(m_.cells.with(nullptr), 0, cells), static_cast<int>(cells), 0};
      for (int i = 0; i < kCellTries && b.many - b.few > 2; ++i) {
        const int found = priced_.divide(m_.cells, cells, price);
        b.take(clusters, found, priced_.cost(), price);
        price = b.guess(price, found, b.few < clusters - 1 ? clusters - 1 : clusters + 1);
      }
      price = b.balance();
    }
    KmeansBracket b{1, all, static_cast<int>(size_ < INT32_MAX ? size_ : INT32_MAX), 0};
    for (int i = 0; i < kTries && price > b.low && price < b.high; ++i) {
      const int found = priced_.divide(m_.numbers, size_, price);
      if (found == clusters) return true;
      b.take(clusters, found, priced_.cost(), price);
      price = b.guess(price, found, clusters);
    }
    return false;
  }

  // Divides the numbers into at most so many cells, half of them of as many numbers, half of them as wide,
  // and returns how many there are.
  QUANTRATURE_KMEANS int64_t make_cells(int64_t cells) {
    const double least = from_middle(0), width = from_middle(size_ - 1) - least;
    const double by_number = static_cast<double>(cells) / 2 / static_cast<double>(size_);
    const double by_width = static_cast<double>(cells) / 2 / width;
    int64_t made = 0;
    double next = 1;
    m_.cells.copy(m_.numbers, 0, 0);
    for (int64_t i = 1; i < size_; ++i) {
      const double passed = static_cast<double>(i) * by_number + (from_middle(i) - least) * by_width;
      if (passed < next) continue;
      m_.cells.copy(m_.numbers, i, ++made);
      next = floor(passed) + 1;
    }
    m_.cells.copy(m_.numbers, size_, ++made);
    return made;
  }

  KmeansMemory m_;
  Search& search_;
  KmeansPriced<Search> priced_;
  int64_t size_;
  double middle_;
};

// The first of n numbers from `begin` on that is nearer to centroid c + 1 than to c; value(i) is the i-th.
template <class Value>
QUANTRATURE_KMEANS int64_t kmeans_end(const float* centroids, int c, int64_t begin, int64_t n,
                                      const Value& value) {
  const double near = static_cast<double>(centroids[c]), far = static_cast<double>(centroids[c + 1]);
  int64_t end = n;
  while (begin < end) {
    const int64_t half = begin + (end - begin) / 2;
    const double x = static_cast<double>(value(half));
    if (fabs(far - x) < fabs(near - x))
      end = half;
    else
      begin = half + 1;
  }
  return end;
}

}  // namespace quantrature
