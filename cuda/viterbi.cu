// The search for trellis codes, a block for each sequence in flight. Numeric class E: integers, as
// viterbi.hpp has them.
//
// What is kept between steps are costs of overlaps, 16 bits each: at 16 state bits 16 to 64 KB, twice, which
// fit the shared memory of a block, on Hopper beside the values of all states where those are of one weight;
// what does not fit lies in global memory. A thread has four neighbouring overlaps: their values are one load
// and, with steps of 2 bits or more, they share the cost that each begins with. Which state each overlap was
// reached from is written down in 2, 4 or 8 bits; one thread walks back over that.
#include <type_traits>

#include "backend.cuh"
#include "device/elements.cuh"
#include "finite.cuh"
#include "launch.cuh"
#include "ops/viterbi/cost.hpp"
#include "trellis_reader.cuh"

namespace quantrature::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMostThreads = 1024;
constexpr uint32_t kEach = 4;  // overlaps of a thread
constexpr int64_t kMostHistory = int64_t{1} << 30;
constexpr uint32_t kMostCost = 65535;

struct Walks {
  const int16_t* x;  // rows x (steps x weights of a step)
  int64_t rows, steps;
  int overlap_bits;
  uint32_t stride;        // overlaps, at least kEach
  const int16_t* values;  // of state (j, u) at (j stride + u) x weights of a step
  uint16_t* costs;        // two rows of `stride` for each block, or null: they are in shared memory
  bool values_in_shared;
  uint8_t* ways;  // of all steps, for each block
  uint8_t* codes;
  int64_t code_bytes;
};

// Bits in which it is written from which of the 2^step_bits states an overlap was reached.
constexpr int way_bits(int step_bits) {
  return step_bits <= 2 ? 2 : step_bits <= 4 ? 4 : 8;
}

int64_t values_size(const Walks& w, int step_bits, int per_step) {
  return (int64_t{w.stride} << step_bits) * per_step;
}

// A thread for each place of a state.
__global__ void __launch_bounds__(kThreads)
    value_states(TrellisReader reader, uint32_t stride, double unit, int16_t* values) {
  const uint32_t overlap_bits = static_cast<uint32_t>(reader.state_bits - reader.step_bits);
  const uint32_t place = blockIdx.x * kThreads + threadIdx.x;
  const uint32_t j = place / stride, u = place % stride;
  if (j >> reader.step_bits != 0) return;
  float raw[2] = {0, 0};
  if (u >> overlap_bits == 0) raw_values(reader, (j << overlap_bits) + u, raw);
  for (int v = 0; v < reader.per_step; ++v)
    values[place * static_cast<uint32_t>(reader.per_step) + static_cast<uint32_t>(v)] =
        in_units(unit * (static_cast<double>(raw[v]) / reader.rms));
}

__global__ void __launch_bounds__(kThreads)
    count_units(qtr_matrix x, double unit, double scale, int16_t* out) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < x.rows * x.cols;
       i += step) {
    const float value = load(x.data, x.dtype, i / x.cols * x.row_stride + i % x.cols);
    out[i] = in_units(unit * (static_cast<double>(value) / scale));
  }
}

// Every thread is given the least of all. of_warp may be used again after another call with another.
__device__ uint32_t least_in_block(uint32_t mine, uint32_t* of_warp) {
  const uint32_t lane = threadIdx.x % 32;
  for (int apart = 16; apart > 0; apart /= 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, mine, apart);
    mine = other < mine ? other : mine;
  }
  if (lane == 0) of_warp[threadIdx.x / 32] = mine;
  __syncthreads();
  uint32_t all = of_warp[lane < blockDim.x / 32 ? lane : 0];
  for (int apart = 16; apart > 0; apart /= 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, all, apart);
    all = other < all ? other : all;
  }
  return all;
}

template <int kStepBits, int kPerStep>
class Search {
 public:
  static constexpr uint32_t kStates = 1u << kStepBits;  // that follow from an overlap
  static constexpr int kWayBits = way_bits(kStepBits);
  using Ways =
      std::conditional_t<kWayBits == 2, uint8_t, std::conditional_t<kWayBits == 4, uint16_t, uint32_t>>;

  __device__ Search(const Walks& w, uint16_t* costs, const int16_t* values, uint32_t* least)
      : w_(w),
        costs_(costs),
        values_(values),
        least_(least),
        ways_(reinterpret_cast<Ways*>(w.ways + blockIdx.x * w.steps * step_bytes(w))) {}

  __device__ static int64_t step_bytes(const Walks& w) {
    return static_cast<int64_t>(w.stride / kEach * sizeof(Ways));
  }

  // Costs before the first step: 0 for `only`, or for all if it is none.
  __device__ void begin(uint32_t only, bool all) {
    for (uint32_t u = threadIdx.x; u < w_.stride; u += blockDim.x)
      costs_[u] = static_cast<uint16_t>(all || u == only ? 0 : kMostCost);
    __syncthreads();
  }

  // All steps, the sequence beginning with step `first`; ways are kept from step `keep` on. With a seam, the
  // ways are those that begin with the bits of it.
  template <bool kSeam>
  __device__ void forward(const int16_t* sequence, int64_t first, int64_t keep, uint32_t seam) {
    uint32_t common = 0;
    int64_t at = first;
    for (int64_t t = 0; t < w_.steps; ++t, at = at + 1 < w_.steps ? at + 1 : 0) {
      int x[kPerStep];
      for (int v = 0; v < kPerStep; ++v) x[v] = sequence[at * kPerStep + v];
      uint32_t low = 0, high = kStates;
      if (kSeam && t * kStepBits < w_.overlap_bits) {
        const int open = w_.overlap_bits - static_cast<int>(t) * kStepBits;  // bits of the seam from here on
        const int settled = open < kStepBits ? open : kStepBits;
        const uint32_t bits = seam >> (open - settled) & ((1u << settled) - 1);
        low = bits << (kStepBits - settled), high = (bits + 1) << (kStepBits - settled);
      }
      const uint16_t* from = costs_ + t % 2 * w_.stride;
      uint16_t* to = costs_ + (t + 1) % 2 * w_.stride;
      uint32_t least = kMostCost;
      for (uint32_t u = threadIdx.x * kEach; u < w_.stride; u += blockDim.x * kEach) {
        uint32_t best[kEach];
        cheapest(from, x, u, 0, kStates, best);
        uint16_t costs[kEach];
        for (uint32_t i = 0; i < kEach; ++i) {
          uint32_t cost = best[i] >> 8;
          if ((u + i) >> w_.overlap_bits != 0) cost = kMostCost;
          cost = cost > common ? cost - common : 0;
          least = cost < least ? cost : least;
          costs[i] = static_cast<uint16_t>(cost);
        }
        *reinterpret_cast<uint2*>(to + u) =
            make_uint2(costs[0] | uint32_t{costs[1]} << 16, costs[2] | uint32_t{costs[3]} << 16);
        if (t < keep) continue;
        if (kSeam && high - low < kStates) cheapest(from, x, u, low, high, best);
        uint32_t ways = 0;
        for (uint32_t i = 0; i < kEach; ++i) ways |= (best[i] & 255u) << (i * kWayBits);
        ways_[t * (w_.stride / kEach) + u / kEach] = static_cast<Ways>(ways);
      }
      common = least_in_block(least, least_ + t % 2 * 32);
    }
  }

  // The lowest of the overlaps with the least cost after all steps.
  __device__ uint32_t cheapest_end() {
    const uint16_t* last = costs_ + w_.steps % 2 * w_.stride;
    uint32_t best = UINT32_MAX;
    for (uint32_t u = threadIdx.x; u >> w_.overlap_bits == 0; u += blockDim.x) {
      const uint32_t key = uint32_t{last[u]} << 16 | u;
      best = key < best ? key : best;
    }
    return least_in_block(best, least_ + 64) & 0xFFFFu;
  }

  // The first bits of the state of step t on the best walk to an overlap, which becomes the one before.
  __device__ uint32_t back(int64_t t, uint32_t* overlap) const {
    const uint32_t ways = ways_[t * (w_.stride / kEach) + *overlap / kEach];
    const uint32_t j = ways >> (*overlap % kEach * kWayBits) & (kStates - 1);
    *overlap = ((j << w_.overlap_bits) + *overlap) >> kStepBits;
    return j;
  }

 private:
  // For each of the overlaps from u on the least cost and, below it, the first bits of the state that has it,
  // the lowest of equal ones.
  __device__ void cheapest(const uint16_t* from, const int* x, uint32_t u, uint32_t low, uint32_t high,
                           uint32_t* best) const {
    for (uint32_t i = 0; i < kEach; ++i) best[i] = UINT32_MAX;
#pragma unroll 4
    for (uint32_t j = low; j < high; ++j) {
      const uint32_t state = (j << w_.overlap_bits) + u;
      const uint32_t first = from[state >> kStepBits];
      const uint32_t second = kStepBits == 1 ? from[(state >> 1) + 1] : first;
      uint32_t words[2 * kPerStep];
      read(values_ + (j * w_.stride + u) * kPerStep, words);
      for (uint32_t i = 0; i < kEach; ++i) {
        uint32_t cost = i < 2 ? first : second;
        for (uint32_t v = 0; v < kPerStep; ++v) {
          const uint32_t k = i * kPerStep + v;
          const int apart = x[v] - static_cast<int16_t>(words[k / 2] >> (k % 2 * 16) & 0xFFFFu);
          const int d = apart < 0 ? -apart : apart;
          const int limited = d < 32767 ? d : 32767;
          cost += static_cast<uint32_t>(limited * limited + (1 << 14)) >> 15;
        }
        cost = cost < kMostCost ? cost : kMostCost;
        const uint32_t key = cost << 8 | j;
        best[i] = key < best[i] ? key : best[i];
      }
    }
  }

  __device__ static void read(const int16_t* at, uint32_t (&words)[2]) {
    const uint2 two = *reinterpret_cast<const uint2*>(at);
    words[0] = two.x, words[1] = two.y;
  }
  __device__ static void read(const int16_t* at, uint32_t (&words)[4]) {
    const uint4 four = *reinterpret_cast<const uint4*>(at);
    words[0] = four.x, words[1] = four.y, words[2] = four.z, words[3] = four.w;
  }

  const Walks& w_;
  uint16_t* costs_;
  const int16_t* values_;
  uint32_t* least_;
  Ways* ways_;
};

template <int kStepBits, int kPerStep>
__global__ void __launch_bounds__(kMostThreads) search_walks(Walks w) {
  __shared__ uint32_t least[3 * 32], shared_seam;
  auto* shared = static_cast<int16_t*>(dynamic_shared());
  const int16_t* values = w.values;
  if (w.values_in_shared) {
    const uint32_t words = (w.stride << kStepBits) * kPerStep / 2;
    for (uint32_t i = threadIdx.x; i < words; i += blockDim.x)
      reinterpret_cast<uint32_t*>(shared)[i] = reinterpret_cast<const uint32_t*>(w.values)[i];
    values = shared;
    shared += 2 * words;
  }
  uint16_t* costs =
      w.costs != nullptr ? w.costs + 2 * blockIdx.x * int64_t{w.stride} : reinterpret_cast<uint16_t*>(shared);
  Search<kStepBits, kPerStep> search(w, costs, values, least);
  const int64_t turn = w.steps / 2;
  for (int64_t row = blockIdx.x; row < w.rows; row += gridDim.x) {
    const int16_t* sequence = w.x + row * w.steps * kPerStep;
    search.begin(0, true);
    search.template forward<false>(sequence, w.steps - turn, turn, 0);
    uint32_t overlap = search.cheapest_end();
    if (threadIdx.x == 0) {
      for (int64_t t = w.steps - 1; t >= turn; --t) search.back(t, &overlap);
      shared_seam = overlap;
    }
    __syncthreads();
    const uint32_t seam = shared_seam;
    search.begin(seam, false);
    search.template forward<true>(sequence, 0, 0, seam);
    if (threadIdx.x != 0) continue;
    overlap = seam;
    // From the last bit to the first, behind the zeros that fill the last byte.
    int64_t byte = (row + 1) * w.code_bytes;
    uint32_t bits = 0;
    int held = static_cast<int>(w.code_bytes * 8 - w.steps * kStepBits);
    for (int64_t t = w.steps - 1; t >= 0; --t) {
      bits |= search.back(t, &overlap) << held;
      for (held += kStepBits; held >= 8; held -= 8, bits >>= 8) w.codes[--byte] = static_cast<uint8_t>(bits);
    }
  }
}

template <int kStepBits, int kPerStep>
void search(Walks w, int ordinal, cudaStream_t stream) {
  const auto kernel = &search_walks<kStepBits, kPerStep>;
  const int64_t static_bytes = 1 << 10;
  const int64_t room = attribute_of(cudaDevAttrMaxSharedMemoryPerBlockOptin, ordinal) - static_bytes;
  const int64_t of_values = 2 * values_size(w, kStepBits, kPerStep), of_costs = 4 * int64_t{w.stride};
  const bool costs_in_shared = of_costs <= room;
  w.values_in_shared = costs_in_shared && of_costs + of_values <= room;
  const int64_t shared = (costs_in_shared ? of_costs : 0) + (w.values_in_shared ? of_values : 0);
  const auto threads =
      static_cast<unsigned>(std::clamp<int64_t>(ceil_div(w.stride / kEach, 32) * 32, 32, kMostThreads));
  const int64_t of_ways = w.steps * (int64_t{w.stride} * way_bits(kStepBits) / 8);
  const int64_t together = std::clamp<int64_t>(room / (shared + static_bytes), 1, 2048 / threads);
  const int64_t in_flight = std::min(
      {w.rows, together * attribute_of(cudaDevAttrMultiProcessorCount, ordinal), kMostHistory / of_ways});
  const unsigned blocks = blocks_for(in_flight);
  Scratch<uint8_t> ways(blocks * of_ways, stream);
  Scratch<uint16_t> costs(costs_in_shared ? 0 : blocks * 2 * int64_t{w.stride}, stream);
  w.ways = ways.get();
  w.costs = costs_in_shared ? nullptr : costs.get();
  expect(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
         "asking for shared memory");
  launch(kernel, blocks, threads, static_cast<size_t>(shared), stream, w);
}

}  // namespace

void trellis_quantize(const qtr_trellis_quantize_args& a) {
  const cudaStream_t stream = stream_of(a.device);
  refuse_not_finite(a.x, "trellis_quantize", "x", stream, "column");
  const DeviceTrellis trellis(a.trellis, stream);
  const TrellisReader& reader = trellis.get();
  const double unit = viterbi_unit(reader.bits);
  Walks w{};
  w.rows = a.x.rows;
  w.steps = a.x.cols / reader.per_step;
  w.overlap_bits = reader.state_bits - reader.step_bits;
  w.stride = std::max(kEach, 1u << w.overlap_bits);
  w.codes = a.codes;
  w.code_bytes = ceil_div(a.x.cols * reader.bits, 8);

  Scratch<int16_t> values(values_size(w, reader.step_bits, reader.per_step), stream);
  launch(value_states, blocks_for(ceil_div(int64_t{w.stride} << reader.step_bits, kThreads)), kThreads, 0,
         stream, reader, w.stride, unit, values.get());
  Scratch<int16_t> x(a.x.rows * a.x.cols, stream);
  launch(count_units, blocks_for(std::min<int64_t>(ceil_div(a.x.rows * a.x.cols, kThreads), 1 << 16)),
         kThreads, 0, stream, a.x, unit, static_cast<double>(a.scale), x.get());
  w.values = values.get();
  w.x = x.get();
  const int ordinal = a.device.ordinal;
  switch (10 * reader.per_step + reader.step_bits) {
    case 11:
      return search<1, 1>(w, ordinal, stream);
    case 12:
      return search<2, 1>(w, ordinal, stream);
    case 13:
      return search<3, 1>(w, ordinal, stream);
    case 14:
      return search<4, 1>(w, ordinal, stream);
    case 22:
      return search<2, 2>(w, ordinal, stream);
    case 24:
      return search<4, 2>(w, ordinal, stream);
    case 26:
      return search<6, 2>(w, ordinal, stream);
    default:
      return search<8, 2>(w, ordinal, stream);
  }
}

}  // namespace quantrature::cuda
