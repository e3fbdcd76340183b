#include <limits>

#include "ops/kmeans/sums.hpp"
#include "runtime/reference.hpp"

namespace quantrature::reference {
namespace {

// Where the last cluster of the numbers before `end` begins best within [first, last], the lowest place of
// equal ones, and what they then cost.
int64_t kmeans_begin(const KmeansSums& s, int64_t first, int64_t last, int64_t end, double* least) noexcept {
  *least = std::numeric_limits<double>::infinity();
  int64_t at = first;
  for (int64_t begin = first; begin <= last; ++begin) {
    const double cost = s.best[begin] + kmeans_cost(s, begin, end);
    if (cost < *least) *least = cost, at = begin;
  }
  return at;
}

// The same for kKmeansEnds ends from `end` on, with the price of a cluster added.
void kmeans_begins(const KmeansSums& s, int64_t first, int64_t last, int64_t end, double price, double* least,
                   int32_t* begins) noexcept {
  for (int64_t i = 0; i < kKmeansEnds; ++i) {
    begins[i] = static_cast<int32_t>(kmeans_begin(s, first, last, end + i, &least[i]));
    least[i] += price;
  }
}

}  // namespace

void fill_kmeans(KernelTable& table) {
  table.kmeans_begin = kmeans_begin;
  table.kmeans_begins = kmeans_begins;
}

}  // namespace quantrature::reference
