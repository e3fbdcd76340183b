// Exact selection by counting digits of ordered keys. Three passes over the data: count the highest digits;
// count what reaches the digit of the k-th largest; gather that, in order. The rest is done among those
// candidates. No result depends on the order in which threads run. Numeric class E.
#include "backend.cuh"
#include "common/ordered_key.hpp"
#include "device/elements.cuh"
#include "launch.cuh"
#include "scan.cuh"

#include <vector>

namespace quantrature::cuda {
namespace {

constexpr int kThreads = 256;
constexpr uint32_t kBins = 4096;
constexpr uint32_t kNanBin = kBins - 1;  // of the first digit; no number has it
constexpr int64_t kSegment = 8192;       // elements of a block, whose order is kept
constexpr int kEach = 4;                 // neighbours of a thread

// What is known of the k-th largest key: its digits so far, and how many with these digits are among the k.
struct Reach {
  uint32_t higher;
  uint32_t has_nan;
  int64_t left;
};

struct Digit {
  uint32_t shift, bits;
};
constexpr int kDigits = 3;
QUANTRATURE_INLINE Digit digit_of(int pass) {
  return pass == 0 ? Digit{20, 12} : pass == 1 ? Digit{10, 10} : Digit{0, 10};
}

__device__ uint32_t key_at(const qtr_matrix& x, int64_t i, bool by_abs) {
  const int64_t at = x.rows == 1 ? i : i / x.cols * x.row_stride + i % x.cols;
  return ordered_key(score_of(load(x.data, x.dtype, at), by_abs));
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

__global__ void __launch_bounds__(kThreads)
    count_first_digits(qtr_matrix x, bool by_abs, unsigned long long* bins) {
  count_digits(x.rows * x.cols, [&](int64_t i) { return key_at(x, i, by_abs); }, digit_of(0), 0, bins);
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
  const bool has_nan = before.has_nan != 0 || (digit.shift == 20 && bins[kNanBin] != 0);
  *reach = {before.higher << digit.bits | bin, has_nan, left};
}

// The keys of a thread's neighbours in a tile of a segment, and how many of them there are.
__device__ int tile_of_keys(const qtr_matrix& x, bool by_abs, int64_t first, int64_t end,
                            uint32_t (&keys)[kEach]) {
  int n = 0;
  for (int k = 0; k < kEach; ++k)
    if (first + k < end) {
      keys[k] = key_at(x, first + k, by_abs);
      n = k + 1;
    }
  return n;
}

// How many keys of each segment reach the known first digit.
__global__ void __launch_bounds__(kThreads)
    count_reaching(qtr_matrix x, bool by_abs, const Reach* reach, int64_t* counts) {
  const int64_t n = x.rows * x.cols;
  const uint32_t least = reach->higher << digit_of(0).shift;
  for (int64_t s = blockIdx.x; s * kSegment < n; s += gridDim.x) {
    const int64_t end = (s + 1) * kSegment < n ? (s + 1) * kSegment : n;
    unsigned mine = 0, total;
    for (int64_t base = s * kSegment; base < end; base += kThreads * kEach) {
      uint32_t keys[kEach];
      const int here = tile_of_keys(x, by_abs, base + threadIdx.x * kEach, end, keys);
      for (int k = 0; k < here; ++k) mine += keys[k] >= least;
    }
    before_in_block<kThreads>(mine, &total);
    if (threadIdx.x == 0) counts[s] = total;
  }
}

__global__ void __launch_bounds__(kThreads)
    gather_reaching(qtr_matrix x, bool by_abs, const Reach* reach, const int64_t* starts, uint32_t* out_keys,
                    int64_t* out_places) {
  const int64_t n = x.rows * x.cols;
  const uint32_t least = reach->higher << digit_of(0).shift;
  for (int64_t s = blockIdx.x; s * kSegment < n; s += gridDim.x) {
    const int64_t end = (s + 1) * kSegment < n ? (s + 1) * kSegment : n;
    int64_t to = starts[s];
    for (int64_t base = s * kSegment; base < end; base += kThreads * kEach) {
      const int64_t first = base + threadIdx.x * kEach;
      uint32_t keys[kEach];
      const int here = tile_of_keys(x, by_abs, first, end, keys);
      unsigned mine = 0, total;
      for (int k = 0; k < here; ++k) mine += keys[k] >= least;
      int64_t at = to + before_in_block<kThreads>(mine, &total);
      for (int k = 0; k < here; ++k)
        if (keys[k] >= least) {
          out_keys[at] = keys[k];
          out_places[at++] = first + k;
        }
      to += total;
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
    select_in_rows(qtr_matrix x, int64_t k, bool by_abs, int64_t* indices, void* values, unsigned* has_nan) {
  __shared__ uint32_t counts[kBins];
  for (int64_t row = blockIdx.x; row < x.rows; row += gridDim.x) {
    const int64_t first = row * x.cols;
    uint32_t higher = 0;
    int64_t left = k;
    bool nan = false;
    for (int pass = 0; pass < kDigits; ++pass) {
      const Digit digit = digit_of(pass);
      clear(counts, 1u << digit.bits);
      for (int64_t c = threadIdx.x; c < x.cols; c += kThreads) {
        const KeyDigit d{digit.shift, digit.bits, higher};
        const uint32_t key = key_at(x, first + c, by_abs);
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
      const uint32_t key = c < x.cols ? key_at(x, first + c, by_abs) : 0;
      const bool tie = c < x.cols && key == higher;
      unsigned ties_here, taken_here;
      const int64_t rank = ties_before + before_in_block<kThreads>(static_cast<unsigned>(tie), &ties_here);
      const bool taken = c < x.cols && (key > higher || (tie && rank < left));
      const int64_t at = to + before_in_block<kThreads>(static_cast<unsigned>(taken), &taken_here);
      if (taken) {
        indices[at] = first + c;
        copy_element(values, at, x, first + c);
      }
      ties_before += ties_here;
      to += taken_here;
    }
  }
}

__global__ void __launch_bounds__(kThreads) find_nan(qtr_matrix x, unsigned long long* first) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < x.rows * x.cols; i += step)
    if (key_at(x, i, false) == 0xFFFFFFFFu) atomicMin(first, static_cast<unsigned long long>(i));
}

unsigned grid_of(int64_t n) {
  return blocks_for(std::min<int64_t>(ceil_div(n, 4 * kThreads), 1 << 12));
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

  Scratch<unsigned long long> bins(kBins, stream);
  Scratch<Reach> reach(1, stream);
  const Reach start{0, 0, a.k};
  reach.write(&start, 1);
  bins.fill_bytes(0, kBins);
  for (size_t m = 0; m < x.size(); ++m)
    launch(count_first_digits, grid_of(elements(m)), kThreads, 0, stream, x[m], by_abs, bins.get());
  const auto choose = [&](Digit digit) {
    launch(choose_digit, 1, kThreads, 0, stream, static_cast<const unsigned long long*>(bins.get()), digit,
           reach.get());
  };
  choose(digit_of(0));
  const Reach* known = reach.get();

  Scratch<int64_t> starts(segments.back() + 1, stream);
  for (size_t m = 0; m < x.size(); ++m)
    launch(count_reaching, blocks_for(segments[m + 1] - segments[m]), kThreads, 0, stream, x[m], by_abs,
           known, starts.get() + segments[m]);
  launch(scan_counts, 1, kScanThreads, 0, stream, starts.get(), segments.back());

  // How many candidates each matrix has: memory for them is needed, and places in it.
  std::vector<int64_t> first(x.size() + 1);
  for (size_t m = 0; m <= x.size(); ++m)
    expect(cudaMemcpyAsync(&first[m], starts.get() + segments[m], sizeof(int64_t), cudaMemcpyDeviceToHost,
                           stream),
           "reading results");
  Reach found{};
  reach.read(&found, 1);
  if (found.has_nan != 0) refuse_nan(a, op, name, stream);

  const int64_t candidates = first.back();
  Scratch<uint32_t> keys(candidates, stream);
  Scratch<int64_t> places(candidates, stream);
  for (size_t m = 0; m < x.size(); ++m)
    launch(gather_reaching, blocks_for(segments[m + 1] - segments[m]), kThreads, 0, stream, x[m], by_abs,
           known, static_cast<const int64_t*>(starts.get() + segments[m]), keys.get(), places.get());
  for (int d = 1; d < kDigits; ++d) {
    bins.fill_bytes(0, kBins);
    launch(count_digits_of_keys, grid_of(candidates), kThreads, 0, stream,
           static_cast<const uint32_t*>(keys.get()), candidates, digit_of(d), known, bins.get());
    choose(digit_of(d));
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
  reach.read(&found, 1);
  const auto selected_before = [&](size_t m) { return more[m] + std::min(ties[m], found.left); };
  for (size_t m = 0; m < x.size(); ++m) a.counts[m] = selected_before(m + 1) - selected_before(m);
}

void topk(const qtr_topk_args& a) {
  select_largest(a, "topk", "x");
}

}  // namespace quantrature::cuda
