// Centroids of the numbers of each row, a block for each row in flight. Numeric class E: the search is that
// of the CPU (ops/kmeans/row.hpp), sums in the same order and costs in the same operations. The block sorts
// and assigns; two threads add up outwards from the middle; one warp searches, 32 places where a cluster may
// begin at a time. What bounds it is how long each step takes, not how many: so blocks are
// small, for a multiprocessor to have many rows to go on with.
#include <bit>

#include "backend.cuh"
#include "common/ordered_key.hpp"
#include "device/elements.cuh"
#include "finite.cuh"
#include "launch.cuh"
#include "ops/kmeans/row.hpp"
#include "scan.cuh"

namespace quantrature::cuda {
namespace {

constexpr int kThreads = 64;
constexpr int kTogether = 10;  // blocks of a multiprocessor, as registers allow
constexpr int kMostCentroids = 256;
constexpr int64_t kMostBytes = int64_t{1} << 30;

// Memory of the rows in flight, one after the other.
struct Memory {
  int64_t sorted, places, cell_places, splits;  // sizes of a row
  uint64_t* pairs;                              // keys and positions; a power of two of them
  uint64_t* weighted;                           // those of positive weight
  float* distinct;
  double* sums;
  int32_t* from;
  int32_t* split;

  QUANTRATURE_INLINE int64_t sums_size() const { return 6 * places + 3 * cell_places; }
};

struct Rows {
  qtr_matrix x, weights;
  int k;
  qtr_mutable_matrix centroids;
  uint8_t* assignment;
  Memory memory;
};

// What a row asks for, by the threads of a warp.
struct WarpSearch {
  int32_t* split;

  __device__ int64_t begin(const KmeansSums& s, int64_t first, int64_t last, int64_t end,
                           double* least) const {
    __syncwarp();  // what the others have written is seen
    double lowest = std::numeric_limits<double>::infinity();
    int64_t at = first;
    for (int64_t b = first + threadIdx.x % 32; b <= last; b += 32)
      take(s.best[b] + kmeans_cost(s, b, end), b, lowest, at);
    together(16, 1, lowest, at);
    *least = lowest;
    return at;
  }

  // Four threads for each end.
  __device__ void begins(const KmeansSums& s, int64_t first, int64_t last, int64_t end, double price,
                         double* least, int32_t* begins) const {
    __syncwarp();
    const int64_t lane = threadIdx.x % 32, mine = lane % kKmeansEnds;
    double lowest = std::numeric_limits<double>::infinity();
    int64_t at = first;
    for (int64_t b = first + lane / kKmeansEnds; b <= last; b += 32 / kKmeansEnds)
      take(s.best[b] + kmeans_cost(s, b, end + mine), b, lowest, at);
    together(16, kKmeansEnds, lowest, at);
    if (lane < kKmeansEnds) least[mine] = lowest + price, begins[mine] = static_cast<int32_t>(at);
    __syncwarp();
  }

  __device__ int32_t* splits(int64_t) const { return split; }

 private:
  __device__ static void take(double cost, int64_t begin, double& lowest, int64_t& at) {
    if (cost < lowest) lowest = cost, at = begin;
  }

  // The lowest of threads that are multiples of `apart` from each other, the first place of equal ones.
  __device__ static void together(int most, int apart, double& lowest, int64_t& at) {
    for (; most >= apart; most /= 2) {
      const double other = __shfl_xor_sync(0xffffffffu, lowest, most);
      const int64_t place = __shfl_xor_sync(0xffffffffu, at, most);
      if (other < lowest || (other == lowest && place < at)) lowest = other, at = place;
    }
  }
};

__global__ void __launch_bounds__(256) find_unfit_weight(qtr_matrix weights, unsigned long long* first) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * 256;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x; i < weights.rows * weights.cols;
       i += step) {
    const float weight =
        load(weights.data, weights.dtype, i / weights.cols * weights.row_stride + i % weights.cols);
    // A negative one has the sign as its highest bit.
    if (std::bit_cast<uint32_t>(weight + 0.0f) >= 0x7F800000u)
      atomicMin(first, static_cast<unsigned long long>(i));
  }
}

// In ascending order; all are different.
__device__ void sort(uint64_t* pairs, int64_t count) {
  for (int64_t size = 2; size <= count; size *= 2)
    for (int64_t apart = size / 2; apart > 0; apart /= 2) {
      for (int64_t i = threadIdx.x; i < count / 2; i += kThreads) {
        const int64_t low = 2 * i - (i & (apart - 1)), high = low + apart;
        const uint64_t a = pairs[low], b = pairs[high];
        if ((a > b) == ((low & size) == 0)) pairs[low] = b, pairs[high] = a;
      }
      __syncthreads();
    }
}

// Calls keep(i, place) for each i below n that is wanted, place being how many wanted ones come before it;
// returns how many are wanted.
template <class Wanted, class Keep>
__device__ int64_t select(int64_t n, const Wanted& wanted, const Keep& keep) {
  int64_t before = 0;
  for (int64_t base = 0; base < n; base += kThreads) {
    const int64_t i = base + threadIdx.x;
    const bool own = i < n && wanted(i);
    int all = 0;
    const int place = before_in_block<kThreads>(own ? 1 : 0, &all);
    if (own) keep(i, before + place);
    before += all;
  }
  __syncthreads();
  return before;
}

__device__ uint32_t key_of(uint64_t pair) {
  return static_cast<uint32_t>(pair >> 32);
}
__device__ int64_t position_of(uint64_t pair) {
  return static_cast<int64_t>(pair & 0xFFFFFFFFu);
}

__global__ void __launch_bounds__(kThreads, kTogether) solve_rows(Rows r) {
  __shared__ int64_t ends[kMostCentroids];
  const Memory& m = r.memory;
  const int64_t n = r.x.cols, block = blockIdx.x;
  uint64_t *pairs = m.pairs + block * m.sorted, *weighted = m.weighted + block * n;
  double* sums = m.sums + block * m.sums_size();
  double* cells = sums + 6 * m.places;
  const KmeansMemory own{m.distinct + block * n,
                         sums,
                         {sums + m.places, sums + 2 * m.places, sums + 3 * m.places},
                         {cells, cells + m.cell_places, cells + 2 * m.cell_places},
                         sums + 4 * m.places,
                         sums + 5 * m.places,
                         m.from + block * m.places};
  WarpSearch search{m.split + block * m.splits};
  for (int64_t row = block; row < r.x.rows; row += gridDim.x) {
    const auto given = [&](int64_t i) {
      return r.weights.data == nullptr
                 ? 0.0f
                 : load(r.weights.data, r.weights.dtype, row * r.weights.row_stride + i);
    };
    bool some = false;
    for (int64_t i = threadIdx.x; i < m.sorted; i += kThreads) {
      const float x = i < n ? load(r.x.data, r.x.dtype, row * r.x.row_stride + i) : 0.0f;
      pairs[i] = i < n ? uint64_t{ordered_key(x)} << 32 | static_cast<uint64_t>(i) : UINT64_MAX;
      some = some || (i < n && given(i) > 0);
    }
    some = __syncthreads_or(some) != 0;
    const auto weight = [&](uint64_t pair) { return some ? given(position_of(pair)) : 1.0f; };
    sort(pairs, m.sorted);
    const int64_t count = select(
        n, [&](int64_t i) { return weight(pairs[i]) > 0; },
        [&](int64_t i, int64_t place) { weighted[place] = pairs[i]; });
    const int64_t size = select(
        count, [&](int64_t i) { return i == 0 || key_of(weighted[i]) != key_of(weighted[i - 1]); },
        [&](int64_t i, int64_t place) {
          const uint32_t key = key_of(weighted[i]);
          double held = 0;
          for (int64_t j = i; j < count && key_of(weighted[j]) == key; ++j)
            held += static_cast<double>(weight(weighted[j]));
          own.distinct[place] = score_of_key(key);
          own.mass[place] = held;
        });

    float* centroids = static_cast<float*>(r.centroids.data) + row * r.centroids.row_stride;
    KmeansRow<WarpSearch> solver(own, search, size);
    if (threadIdx.x == 0) solver.add_up(1);
    if (threadIdx.x == 32) solver.add_up(-1);
    __syncthreads();
    if (threadIdx.x < 32) {
      solver.solve(r.k, centroids);
      if (threadIdx.x == 0) {
        int64_t end = 0;
        for (int c = 0; c + 1 < r.k; ++c)
          ends[c] = end =
              kmeans_end(centroids, c, end, n, [&](int64_t i) { return score_of_key(key_of(pairs[i])); });
      }
    }
    __syncthreads();
    for (int64_t i = threadIdx.x; i < n; i += kThreads) {
      int low = 0, high = r.k - 1;  // the first whose end is beyond i
      while (low < high) {
        const int middle = (low + high) / 2;
        if (i < ends[middle])
          high = middle;
        else
          low = middle + 1;
      }
      r.assignment[row * n + position_of(pairs[i])] = static_cast<uint8_t>(low);
    }
    __syncthreads();
  }
}

// As the CPU does: the first row, and its numbers before its weights.
void refuse_unfit(const qtr_kmeans_args& a, cudaStream_t stream) {
  const int64_t x = first_not_finite(a.x, stream);
  int64_t weight = -1;
  if (a.weights.data != nullptr) {
    Scratch<unsigned long long> first(1, stream);
    first.fill_bytes(0xFF, 1);
    launch(find_unfit_weight, blocks_for(std::min<int64_t>(ceil_div(a.x.rows * a.x.cols, 256), 1 << 16)), 256,
           0, stream, a.weights, first.get());
    unsigned long long at = 0;
    first.read(&at, 1);
    weight = static_cast<int64_t>(at);
  }
  if (x >= 0 && (weight < 0 || x / a.x.cols <= weight / a.x.cols))
    refuse_number(a.x, x, "[kmeans] x must be finite", "value", "column", stream);
  if (weight >= 0)
    refuse_number(a.weights, weight, "[kmeans] weights must be finite and not negative", "weight", "column",
                  stream);
}

}  // namespace

void kmeans(const qtr_kmeans_args& a) {
  const cudaStream_t stream = stream_of(a.device);
  refuse_unfit(a, stream);
  const int64_t n = a.x.cols;
  Memory m{};
  m.sorted = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(n)));
  m.places = kmeans_places(n);
  m.cell_places = kmeans_places(kmeans_most_cells(n, a.k));
  m.splits = a.k * (n + 1);
  const int64_t bytes = 8 * m.sorted + (8 + 4) * n + 8 * m.sums_size() + 4 * (m.places + m.splits);
  const unsigned blocks = blocks_for(
      std::min({a.x.rows, int64_t{kTogether} * attribute_of(cudaDevAttrMultiProcessorCount, a.device.ordinal),
                kMostBytes / bytes}));
  Scratch<uint64_t> pairs(blocks * m.sorted, stream), weighted(blocks * n, stream);
  Scratch<float> distinct(blocks * n, stream);
  Scratch<double> sums(blocks * m.sums_size(), stream);
  Scratch<int32_t> from(blocks * m.places, stream), split(blocks * m.splits, stream);
  m.pairs = pairs.get(), m.weighted = weighted.get(), m.distinct = distinct.get();
  m.sums = sums.get(), m.from = from.get(), m.split = split.get();
  launch(solve_rows, blocks, kThreads, 0, stream, Rows{a.x, a.weights, a.k, a.centroids, a.assignment, m});
}

}  // namespace quantrature::cuda
