// Exact selection by counting digits of ordered keys, in three steps. A least key is found that at least k
// keys reach: if k is small, a guess from a sample, which is checked; else by counting the highest digits of
// all. What reaches it is counted, and gathered in order. The rest is done among those candidates. So the
// data is read twice, or three times. No result depends on the order in which threads run. Numeric class E.
#include "backend.cuh"
#include "common/ordered_key.hpp"
#include "constants.cuh"
#include "device/divide.cuh"
#include "device/elements.cuh"
#include "launch.cuh"
#include "scan.cuh"

#include <cmath>
#include <vector>

namespace quantrature::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr uint32_t kBins = 4096;
constexpr uint32_t kNan = 0xFFFFFFFFu;   // the key of NaN
constexpr uint32_t kNanBin = kBins - 1;  // of the first digit; no number has it
constexpr int64_t kSegment = 8192;       // elements of a block, whose order is kept
constexpr int kFours = 8;                // of a thread: the k'th of lane l begins at element 128 k + 4 l
constexpr int64_t kWarpSegment = kSegment / kWarps;
constexpr int64_t kSampled = 128;  // neighbours of a sample, of each 4096
constexpr int64_t kSampledFrom = 4096;
constexpr int64_t kSampledBelow = 16;  // 1 of how many elements may be taken for a guess

// What is known of the k-th largest key: its digits so far, and how many with these digits are among the k.
struct Reach {
  uint32_t higher;
  int64_t left;
};

struct Digit {
  uint32_t shift, bits;
};
constexpr int kDigits = 3;
QUANTRATURE_INLINE Digit digit_of(int pass) {
  return pass == 0 ? Digit{20, 12} : pass == 1 ? Digit{10, 10} : Digit{0, 10};
}

// From which key on elements are candidates.
struct Least {
  uint32_t key;
  uint32_t has_nan;  // whether there is one among all elements
};

__device__ __forceinline__ uint32_t key_of(float x, bool by_abs) {
  return ordered_key(score_of(x, by_abs));
}

__device__ uint32_t key_at(const qtr_matrix& x, int64_t i, bool by_abs) {
  const int64_t at = x.rows == 1 ? i : i / x.cols * x.row_stride + i % x.cols;
  return key_of(load(x.data, x.dtype, at), by_abs);
}

// The elements of a matrix, row after row.
struct Elements {
  qtr_matrix x;
  bool by_abs;
  bool by_four;  // elements 4 i to 4 i + 3 are side by side and aligned
  Divider fours_of_row;

  Elements(const qtr_matrix& matrix, bool abs) : x(matrix), by_abs(abs), by_four(false), fours_of_row(1) {
    const bool aligned =
        reinterpret_cast<uintptr_t>(x.data) % static_cast<uintptr_t>(4 * bytes_of(x.dtype)) == 0;
    by_four =
        aligned && (x.rows == 1 || (x.cols % 4 == 0 && x.row_stride % 4 == 0 && count() / 4 < kMostDivided));
    if (by_four && x.rows > 1) fours_of_row = Divider(x.cols / 4);
  }
  QUANTRATURE_INLINE int64_t count() const { return x.rows * x.cols; }

  // Elements from `first` on, a multiple of four, where by_four.
  template <qtr_dtype kDtype>
  __device__ __forceinline__ Four aligned_four(int64_t first) const {
    if (x.rows == 1) return load4(x.data, kDtype, first / 4);
    const uint32_t i = static_cast<uint32_t>(first / 4), row = fours_of_row.quotient(i);
    return load4(x.data, kDtype, row * (x.row_stride / 4) + (i - row * fours_of_row.by));
  }

  // The same as long as they are below end, 0 in the place of others.
  template <qtr_dtype kDtype>
  __device__ Four four(int64_t first, int64_t end) const {
    if (by_four && first + 4 <= end) return aligned_four<kDtype>(first);
    Four f{};
    for (int e = 0; e < 4; ++e) {
      if (first + e >= end) break;
      const int64_t i = first + e;
      f.v[e] = load(x.data, kDtype, x.rows == 1 ? i : i / x.cols * x.row_stride + i % x.cols);
    }
    return f;
  }
};

// What a warp has of a segment. Loads of a whole segment stand one after the other, with no branch between
// them, so that all are on their way at a time.
template <qtr_dtype kDtype>
__device__ __forceinline__ void read_segment(const Elements& elements, int64_t begin, int64_t end, int lane,
                                             Four (&values)[kFours]) {
  if (!elements.by_four || begin + kWarpSegment > end) {
#pragma unroll
    for (int k = 0; k < kFours; ++k) values[k] = elements.four<kDtype>(begin + 128 * k + 4 * lane, end);
    return;
  }
#pragma unroll
  for (int k = 0; k < kFours; ++k) values[k] = elements.aligned_four<kDtype>(begin + 128 * k + 4 * lane);
}

// The bin in which the k-th largest lies, and its rank there. For a block; the result is for all threads.
template <class Count>
__device__ void choose_bin(const Count* counts, uint32_t bins, int64_t k, uint32_t* bin, int64_t* left) {
  __shared__ uint32_t chosen;
  __shared__ int64_t rank;
  const uint32_t each = (bins + kThreads - 1) / kThreads;
  const uint32_t skipped = threadIdx.x * each;  // from the top
  int64_t mine = 0, total;
  for (uint32_t b = skipped; b < skipped + each && b < bins; ++b)
    mine += static_cast<int64_t>(counts[bins - 1 - b]);
  int64_t before = before_in_block<kThreads>(mine, &total);
  if (before < k && k <= before + mine) {
    uint32_t b = skipped;
    while (before + static_cast<int64_t>(counts[bins - 1 - b]) < k)
      before += static_cast<int64_t>(counts[bins - 1 - b++]);
    chosen = bins - 1 - b;
    rank = k - before;
  }
  __syncthreads();
  *bin = chosen;
  *left = rank;
  __syncthreads();
}

__device__ void clear(uint32_t* counts, uint32_t bins) {
  for (uint32_t b = threadIdx.x; b < bins; b += kThreads) counts[b] = 0;
  __syncthreads();
}

// Adds to bins how often each digit comes; of keys whose higher digits are the known ones.
template <class KeyOf>
__device__ void count_digits(int64_t n, const KeyOf& key_of, Digit digit, uint32_t higher,
                             unsigned long long* bins) {
  __shared__ uint32_t counts[kBins];
  clear(counts, 1u << digit.bits);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < n; i += step) {
    const KeyDigit d{digit.shift, digit.bits, higher};
    const uint32_t key = key_of(i);
    if (d.has(key)) atomicAdd(&counts[d.of(key)], 1u);
  }
  __syncthreads();
  for (uint32_t b = threadIdx.x; b < 1u << digit.bits; b += kThreads)
    if (counts[b] != 0) atomicAdd(&bins[b], static_cast<unsigned long long>(counts[b]));
}

// Two counts of each first digit, for even lanes and odd ones, which meet less often than one count would.
struct FirstDigits {
  uint32_t counts[2 * kBins];

  __device__ void clear_all() { clear(counts, 2 * kBins); }
  __device__ __forceinline__ void add(const Four& values, int64_t first, int64_t end, bool by_abs) {
    for (int e = 0; e < 4; ++e)
      if (first + e < end)
        atomicAdd(&counts[2 * (key_of(values.v[e], by_abs) >> digit_of(0).shift) + threadIdx.x % 2], 1u);
  }
  __device__ void give(unsigned long long* bins) const {
    __syncthreads();
    for (uint32_t b = threadIdx.x; b < kBins; b += kThreads)
      if (const uint32_t count = counts[2 * b] + counts[2 * b + 1]; count != 0)
        atomicAdd(&bins[b], static_cast<unsigned long long>(count));
  }
};

template <qtr_dtype kDtype>
__global__ void __launch_bounds__(kThreads) count_first_digits(Elements elements, unsigned long long* bins) {
  __shared__ FirstDigits digits;
  digits.clear_all();
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t n = elements.count();
  for (int64_t begin = (static_cast<int64_t>(blockIdx.x) * kWarps + warp) * kWarpSegment; begin < n;
       begin += static_cast<int64_t>(gridDim.x) * kSegment) {
    Four values[kFours];
    read_segment<kDtype>(elements, begin, n, lane, values);
#pragma unroll
    for (int k = 0; k < kFours; ++k) digits.add(values[k], begin + 128 * k + 4 * lane, n, elements.by_abs);
  }
  digits.give(bins);
}

// The same of a sample: some neighbours out of each 4096, at places that follow no row.
template <qtr_dtype kDtype>
__global__ void __launch_bounds__(kThreads) sample_first_digits(Elements elements, unsigned long long* bins) {
  __shared__ FirstDigits digits;
  digits.clear_all();
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t n = elements.count(), parts = (n + kSampledFrom - 1) / kSampledFrom;
  for (int64_t part = static_cast<int64_t>(blockIdx.x) * kWarps + warp; part < parts;
       part += static_cast<int64_t>(gridDim.x) * kWarps) {
    const uint32_t which =
        static_cast<uint32_t>(part) * 2654435769u >> 27;  // of 32: the golden ratio spreads them
    const int64_t first = part * kSampledFrom + which * kSampled + 4 * lane;
    digits.add(elements.four<kDtype>(first, n), first, n, elements.by_abs);
  }
  digits.give(bins);
}

__global__ void __launch_bounds__(kThreads)
    count_digits_of_keys(const uint32_t* keys, int64_t n, Digit digit, const Reach* reach,
                         unsigned long long* bins) {
  count_digits(n, [&](int64_t i) { return keys[i]; }, digit, reach->higher, bins);
}

__global__ void __launch_bounds__(kThreads)
    choose_digit(const unsigned long long* bins, Digit digit, Reach* reach) {
  uint32_t bin;
  int64_t left;
  const Reach before = *reach;
  choose_bin(bins, 1u << digit.bits, before.left, &bin, &left);
  if (threadIdx.x != 0) return;
  *reach = {before.higher << digit.bits | bin, left};
}

// The first digit of the k-th largest key of all elements, or of a sample in which it is most likely no
// larger than that.
__global__ void __launch_bounds__(kThreads)
    choose_least(const unsigned long long* bins, int64_t k, int64_t elements, bool sampled, Least* least) {
  int64_t mine = 0, counted;
  for (uint32_t b = threadIdx.x; b < kBins; b += kThreads) mine += static_cast<int64_t>(bins[b]);
  before_in_block<kThreads>(mine, &counted);
  int64_t rank = k;
  if (sampled) {
    const double expected =
        static_cast<double>(k) * static_cast<double>(counted) / static_cast<double>(elements);
    rank = static_cast<int64_t>(1.25 * expected + 6 * std::sqrt(expected)) + 16;
  }
  uint32_t bin = 0;
  int64_t left;
  if (rank <= counted) choose_bin(bins, kBins, rank, &bin, &left);
  if (threadIdx.x == 0) *least = {bin << digit_of(0).shift, 0};
}

// How many keys of each segment are candidates.
template <qtr_dtype kDtype>
__global__ void __launch_bounds__(kThreads) count_reaching(Elements elements, Least* least, int64_t* counts) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t n = elements.count();
  const uint32_t from = least->key;
  for (int64_t s = blockIdx.x; s * kSegment < n; s += gridDim.x) {
    const int64_t begin = s * kSegment + warp * kWarpSegment;
    Four values[kFours];
    read_segment<kDtype>(elements, begin, n, lane, values);
    unsigned mine = 0, total;
    bool nan = false;
#pragma unroll
    for (int k = 0; k < kFours; ++k)
      for (int e = 0; e < 4; ++e) {
        const uint32_t key = key_of(values[k].v[e], elements.by_abs);
        mine += key >= from && begin + 128 * k + 4 * lane + e < n;
        nan = nan || key == kNan;
      }
    if (nan) atomicOr(&least->has_nan, 1u);
    before_in_block<kThreads>(mine, &total);
    if (threadIdx.x == 0) counts[s] = total;
  }
}

// The candidates in order. Every warp has neighbours in its registers, so that what comes before them in a
// segment is known after one sum over the block.
template <qtr_dtype kDtype>
__global__ void __launch_bounds__(kThreads)
    gather_reaching(Elements elements, const Least* least, const int64_t* starts, uint32_t* out_keys,
                    int64_t* out_places) {
  __shared__ unsigned of_warp[kWarps];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const unsigned below = (1u << lane) - 1;
  const int64_t n = elements.count();
  const uint32_t from = least->key;
  for (int64_t s = blockIdx.x; s * kSegment < n; s += gridDim.x) {
    const int64_t begin = s * kSegment + warp * kWarpSegment;
    Four values[kFours];
    read_segment<kDtype>(elements, begin, n, lane, values);
    unsigned taken = 0;  // bit 4 k + e: of element e of four k
#pragma unroll
    for (int k = 0; k < kFours; ++k)
      for (int e = 0; e < 4; ++e)
        if (key_of(values[k].v[e], elements.by_abs) >= from && begin + 128 * k + 4 * lane + e < n)
          taken |= 1u << (4 * k + e);
    unsigned of_lanes = static_cast<unsigned>(__popc(taken));
    for (int apart = 16; apart > 0; apart /= 2) of_lanes += __shfl_xor_sync(0xffffffffu, of_lanes, apart);
    if (lane == 0) of_warp[warp] = of_lanes;
    __syncthreads();
    int64_t to = starts[s];
    for (int w = 0; w < warp; ++w) to += of_warp[w];
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kFours; ++k) {
      const unsigned four = taken >> (4 * k) & 15;
      if (!__any_sync(0xffffffffu, four != 0)) continue;
      int64_t at = to;
      for (int e = 0; e < 4; ++e) {
        const unsigned have = __ballot_sync(0xffffffffu, four >> e & 1);
        at += __popc(have & below);
        to += __popc(have);
      }
      for (int e = 0; e < 4; ++e)
        if (four >> e & 1) {
          out_keys[at] = key_of(values[k].v[e], elements.by_abs);
          out_places[at++] = begin + 128 * k + 4 * lane + e;
        }
    }
  }
}

// Candidates above the k-th largest, and equal to it, of each segment.
__global__ void __launch_bounds__(kThreads)
    count_selected(const uint32_t* keys, int64_t n, const Reach* reach, int64_t* above, int64_t* equal) {
  const uint32_t threshold = reach->higher;
  for (int64_t s = blockIdx.x; s * kSegment < n; s += gridDim.x) {
    const int64_t end = (s + 1) * kSegment < n ? (s + 1) * kSegment : n;
    unsigned more = 0, ties = 0, total;
    for (int64_t i = s * kSegment + threadIdx.x; i < end; i += kThreads) {
      more += keys[i] > threshold;
      ties += keys[i] == threshold;
    }
    before_in_block<kThreads>(more, &total);
    if (threadIdx.x == 0) above[s] = total;
    before_in_block<kThreads>(ties, &total);
    if (threadIdx.x == 0) equal[s] = total;
  }
}

__device__ void copy_element(void* to, int64_t to_at, const qtr_matrix& x, int64_t i) {
  const int64_t at = x.rows == 1 ? i : i / x.cols * x.row_stride + i % x.cols;
  if (x.dtype == QTR_F32)
    static_cast<uint32_t*>(to)[to_at] = static_cast<const uint32_t*>(x.data)[at];
  else
    static_cast<uint16_t*>(to)[to_at] = static_cast<const uint16_t*>(x.data)[at];
}

// Ties are taken from the first on, as many as are left.
__global__ void __launch_bounds__(kThreads)
    write_selected(qtr_matrix x, const uint32_t* keys, const int64_t* places, int64_t n, const Reach* reach,
                   const int64_t* above, const int64_t* equal, int64_t* indices, void* values) {
  const uint32_t threshold = reach->higher;
  const int64_t ties_taken = reach->left;
  for (int64_t s = blockIdx.x; s * kSegment < n; s += gridDim.x) {
    const int64_t end = (s + 1) * kSegment < n ? (s + 1) * kSegment : n;
    int64_t more_before = above[s], ties_before = equal[s];
    for (int64_t base = s * kSegment; base < end; base += kThreads) {
      const int64_t i = base + threadIdx.x;
      const bool more = i < end && keys[i] > threshold, tie = i < end && keys[i] == threshold;
      unsigned more_here, ties_here;
      const int64_t rank_of_more =
          more_before + before_in_block<kThreads>(static_cast<unsigned>(more), &more_here);
      const int64_t rank_of_tie =
          ties_before + before_in_block<kThreads>(static_cast<unsigned>(tie), &ties_here);
      if (more || (tie && rank_of_tie < ties_taken)) {
        const int64_t to = rank_of_more + (rank_of_tie < ties_taken ? rank_of_tie : ties_taken);
        indices[to] = places[i];
        copy_element(values, to, x, places[i]);
      }
      more_before += more_here;
      ties_before += ties_here;
    }
  }
}

// A block for each row.
__global__ void __launch_bounds__(kThreads)
    select_in_rows(qtr_matrix all, int64_t k, bool by_abs, int64_t* indices, void* values,
                   unsigned* has_nan) {
  __shared__ uint32_t counts[kBins];
  for (int64_t row = blockIdx.x; row < all.rows; row += gridDim.x) {
    const char* data =
        static_cast<const char*>(all.data) + row * all.row_stride * (all.dtype == QTR_F32 ? 4 : 2);
    const qtr_matrix x{data, 1, all.cols, all.cols, all.dtype};
    uint32_t higher = 0;
    int64_t left = k;
    bool nan = false;
    for (int pass = 0; pass < kDigits; ++pass) {
      const Digit digit = digit_of(pass);
      clear(counts, 1u << digit.bits);
      for (int64_t c = threadIdx.x; c < x.cols; c += kThreads) {
        const KeyDigit d{digit.shift, digit.bits, higher};
        const uint32_t key = key_at(x, c, by_abs);
        if (d.has(key)) atomicAdd(&counts[d.of(key)], 1u);
      }
      __syncthreads();
      nan = nan || (digit.shift == 20 && counts[kNanBin] != 0);
      uint32_t bin;
      choose_bin(counts, 1u << digit.bits, left, &bin, &left);
      higher = higher << digit.bits | bin;
    }
    if (nan) {
      if (threadIdx.x == 0) atomicOr(has_nan, 1u);
      continue;
    }
    int64_t to = row * k, ties_before = 0;
    for (int64_t base = 0; base < x.cols; base += kThreads) {
      const int64_t c = base + threadIdx.x;
      const uint32_t key = c < x.cols ? key_at(x, c, by_abs) : 0;
      const bool tie = c < x.cols && key == higher;
      unsigned ties_here, taken_here;
      const int64_t rank = ties_before + before_in_block<kThreads>(static_cast<unsigned>(tie), &ties_here);
      const bool taken = c < x.cols && (key > higher || (tie && rank < left));
      const int64_t at = to + before_in_block<kThreads>(static_cast<unsigned>(taken), &taken_here);
      if (taken) {
        indices[at] = row * all.cols + c;
        copy_element(values, at, x, c);
      }
      ties_before += ties_here;
      to += taken_here;
    }
  }
}

__global__ void __launch_bounds__(kThreads) find_nan(qtr_matrix x, unsigned long long* first) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < x.rows * x.cols; i += step)
    if (key_at(x, i, false) == kNan) atomicMin(first, static_cast<unsigned long long>(i));
}

unsigned grid_of(int64_t n) {
  return blocks_for(std::min<int64_t>(ceil_div(n, 4 * kThreads), 1 << 12));
}

// Blocks that count into shared memory: as many as run at a time, or nearly, since each adds its counts to
// those of all.
unsigned blocks_of_counts(int64_t pieces) {
  return blocks_for(std::min<int64_t>(pieces, 1024));
}

[[noreturn]] void refuse_nan(const qtr_topk_args& a, const char* op, const char* name, cudaStream_t stream) {
  Scratch<unsigned long long> first(1, stream);
  for (int64_t m = 0; m < a.x_count; ++m) {
    first.fill_bytes(0xFF, 1);
    launch(find_nan, grid_of(a.x[m].rows * a.x[m].cols), kThreads, 0, stream, a.x[m], first.get());
    unsigned long long at = 0;
    first.read(&at, 1);
    if (at == ~0ull) continue;
    const int64_t row = static_cast<int64_t>(at) / a.x[m].cols,
                  column = static_cast<int64_t>(at) % a.x[m].cols;
    throw Refused(std::string("[") + op + "] " + name + " must have no NaN: got " +
                  (a.x_count == 1 ? "" : "array=" + std::to_string(m) + ", ") + "row=" + std::to_string(row) +
                  ", column=" + std::to_string(column));
  }
  throw Refused(std::string("[") + op + "] " + name + " changed during the call");
}

// Rows without gaps between them are one row.
qtr_matrix flat(const qtr_matrix& m) {
  return m.row_stride == m.cols ? qtr_matrix{m.data, 1, m.rows * m.cols, m.rows * m.cols, m.dtype} : m;
}

void by_rows(const qtr_topk_args& a, const char* op, const char* name, cudaStream_t stream) {
  Scratch<unsigned> has_nan(1, stream);
  has_nan.fill_bytes(0, 1);
  launch(select_in_rows, blocks_for(a.x[0].rows), kThreads, 0, stream, a.x[0], a.k, a.key == QTR_KEY_ABS,
         a.indices, a.values, has_nan.get());
  unsigned nan = 0;
  has_nan.read(&nan, 1);
  if (nan != 0) refuse_nan(a, op, name, stream);
  if (a.counts != nullptr) a.counts[0] = a.x[0].rows * a.k;
}

}  // namespace

void select_largest(const qtr_topk_args& a, const char* op, const char* name) {
  const cudaStream_t stream = stream_of(a.device);
  if (a.counts != nullptr) std::fill_n(a.counts, a.x_count, 0);
  if (a.k == 0) return;
  if (a.per_row) return by_rows(a, op, name, stream);
  const bool by_abs = a.key == QTR_KEY_ABS;

  std::vector<qtr_matrix> x;
  std::vector<int64_t> segments{0};  // before each matrix
  for (int64_t m = 0; m < a.x_count; ++m) {
    x.push_back(flat(a.x[m]));
    segments.push_back(segments.back() + ceil_div(a.x[m].rows * a.x[m].cols, kSegment));
  }
  const auto elements = [&](size_t m) { return x[m].rows * x[m].cols; };

  int64_t all = 0;
  for (size_t m = 0; m < x.size(); ++m) all += elements(m);
  const auto with_elements = [&](size_t m, auto&& body) {
    with_dtype(x[m].dtype, [&](auto dtype) { body(dtype, Elements(x[m], by_abs)); });
  };

  Scratch<unsigned long long> bins(kBins, stream);
  Scratch<Least> least(1, stream);
  Scratch<int64_t> starts(segments.back() + 1, stream);
  std::vector<int64_t> first(x.size() + 1);  // how many candidates are before those of each matrix
  // Finds the least key and counts the candidates; from a sample, there may be fewer than k.
  const auto find_candidates = [&](bool sampled) {
    bins.fill_bytes(0, kBins);
    for (size_t m = 0; m < x.size(); ++m)
      with_elements(m, [&](auto dtype, const Elements& e) {
        if (sampled)
          launch(sample_first_digits<dtype.value>,
                 blocks_of_counts(ceil_div(elements(m), kSampledFrom * kWarps)), kThreads, 0, stream, e,
                 bins.get());
        else
          launch(count_first_digits<dtype.value>, blocks_of_counts(ceil_div(elements(m), kSegment)), kThreads,
                 0, stream, e, bins.get());
      });
    launch(choose_least, 1, kThreads, 0, stream, static_cast<const unsigned long long*>(bins.get()), a.k, all,
           sampled, least.get());
    for (size_t m = 0; m < x.size(); ++m)
      with_elements(m, [&](auto dtype, const Elements& e) {
        launch(count_reaching<dtype.value>, blocks_for(segments[m + 1] - segments[m]), kThreads, 0, stream, e,
               least.get(), starts.get() + segments[m]);
      });
    launch(scan_counts, 1, kScanThreads, 0, stream, starts.get(), segments.back());
    for (size_t m = 0; m <= x.size(); ++m)
      expect(cudaMemcpyAsync(&first[m], starts.get() + segments[m], sizeof(int64_t), cudaMemcpyDeviceToHost,
                             stream),
             "reading results");
    Least found{};
    least.read(&found, 1);
    if (found.has_nan != 0) refuse_nan(a, op, name, stream);
  };
  const bool sampled = a.k <= all / kSampledBelow;
  find_candidates(sampled);
  if (sampled && first.back() < a.k) find_candidates(false);

  const int64_t candidates = first.back();
  Scratch<uint32_t> keys(candidates, stream);
  Scratch<int64_t> places(candidates, stream);
  for (size_t m = 0; m < x.size(); ++m)
    with_elements(m, [&](auto dtype, const Elements& e) {
      launch(gather_reaching<dtype.value>, blocks_for(segments[m + 1] - segments[m]), kThreads, 0, stream, e,
             static_cast<const Least*>(least.get()), static_cast<const int64_t*>(starts.get() + segments[m]),
             keys.get(), places.get());
    });
  Scratch<Reach> reach(1, stream);
  const Reach start{0, a.k};
  reach.write(&start, 1);
  const Reach* known = reach.get();
  for (int d = 0; d < kDigits; ++d) {
    bins.fill_bytes(0, kBins);
    launch(count_digits_of_keys, grid_of(candidates), kThreads, 0, stream,
           static_cast<const uint32_t*>(keys.get()), candidates, digit_of(d), known, bins.get());
    launch(choose_digit, 1, kThreads, 0, stream, static_cast<const unsigned long long*>(bins.get()),
           digit_of(d), reach.get());
  }

  // Segments of candidates, none of which is of two matrices.
  std::vector<int64_t> parts{0};
  for (size_t m = 0; m < x.size(); ++m)
    parts.push_back(parts.back() + ceil_div(first[m + 1] - first[m], kSegment));
  Scratch<int64_t> above(parts.back() + 1, stream), equal(parts.back() + 1, stream);
  for (size_t m = 0; m < x.size(); ++m)
    if (first[m + 1] > first[m])
      launch(count_selected, blocks_for(parts[m + 1] - parts[m]), kThreads, 0, stream,
             static_cast<const uint32_t*>(keys.get() + first[m]), first[m + 1] - first[m], known,
             above.get() + parts[m], equal.get() + parts[m]);
  launch(scan_counts, 1, kScanThreads, 0, stream, above.get(), parts.back());
  launch(scan_counts, 1, kScanThreads, 0, stream, equal.get(), parts.back());
  for (size_t m = 0; m < x.size(); ++m)
    if (first[m + 1] > first[m])
      launch(write_selected, blocks_for(parts[m + 1] - parts[m]), kThreads, 0, stream, x[m],
             static_cast<const uint32_t*>(keys.get() + first[m]),
             static_cast<const int64_t*>(places.get() + first[m]), first[m + 1] - first[m], known,
             static_cast<const int64_t*>(above.get() + parts[m]),
             static_cast<const int64_t*>(equal.get() + parts[m]), a.indices, a.values);
  if (a.counts == nullptr) return;
  std::vector<int64_t> more(parts.size()), ties(parts.size());
  for (size_t m = 0; m < parts.size(); ++m)
    expect(cudaMemcpyAsync(&more[m], above.get() + parts[m], sizeof(int64_t), cudaMemcpyDeviceToHost, stream),
           "reading results");
  for (size_t m = 0; m < parts.size(); ++m)
    expect(cudaMemcpyAsync(&ties[m], equal.get() + parts[m], sizeof(int64_t), cudaMemcpyDeviceToHost, stream),
           "reading results");
  Reach found{};
  reach.read(&found, 1);
  const auto selected_before = [&](size_t m) { return more[m] + std::min(ties[m], found.left); };
  for (size_t m = 0; m < x.size(); ++m) a.counts[m] = selected_before(m + 1) - selected_before(m);
}

void topk(const qtr_topk_args& a) {
  select_largest(a, "topk", "x");
}

}  // namespace quantrature::cuda
