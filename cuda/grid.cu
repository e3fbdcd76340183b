// Grids: fitted by half a warp a group, whose 16 threads are the 16 lanes of the reference, so that sums come
// out as they do there; then codes, a tile of a row at a time. Numeric class E. Compiled without contraction.
#include <bit>
#include <limits>
#include <optional>

#include "backend.cuh"
#include "constants.cuh"
#include "device/codes.cuh"
#include "device/divide.cuh"
#include "device/elements.cuh"
#include "device/shrink.cuh"
#include "exclude.cuh"
#include "finite.cuh"
#include "fit.cuh"
#include "launch.cuh"
#include "ops/grid/pieces.hpp"
#include "tile.cuh"

namespace quantrature::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kGroups = kThreads / kLanes;  // of a block at a time

// Numbers group after group, wherever they lie.
struct Source {
  const void* data;
  qtr_dtype dtype;
  GridView view;
  int64_t row_stride;

  __device__ int64_t length(int64_t g) const {
    if (view.axis == 0) return view.group;
    const int64_t begin = g % view.groups_per_row * view.group;
    return begin + view.group < view.cols ? view.group : view.cols - begin;
  }
  // Where number i of group g is, in rows of row_stride numbers.
  __device__ int64_t place(int64_t g, int64_t i) const {
    return view.axis == 1 ? g / view.groups_per_row * row_stride + g % view.groups_per_row * view.group + i
                          : i * row_stride + g;
  }
  __device__ float operator()(int64_t g, int64_t i) const { return load(data, dtype, place(g, i)); }
};

struct Lines {
  float* inv;
  float* zero;
  float* scale;
};

// Four codes as bytes of a word, the first in the lowest.
__device__ __forceinline__ uint32_t four_codes(const Four& x, const Four& inv, const Four& zero, float top) {
  uint32_t code[4];
  for (int k = 0; k < 4; ++k)
    code[k] = std::bit_cast<uint32_t>(code_with_offset(x.v[k], inv.v[k], zero.v[k], top));
  return __byte_perm(__byte_perm(code[0], code[1], 0x0040), __byte_perm(code[2], code[3], 0x0040), 0x5410);
}

// Both halves of a warp go through the same steps, whatever their groups are.
template <int kEach>
__global__ void __launch_bounds__(kThreads)
    fit_groups(Source x, GridRule rule, Lines out, unsigned long long* first_bad) {
  const int64_t groups = x.view.axis == 1 ? x.view.rows * x.view.groups_per_row : x.view.groups_per_row;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kGroups; first < groups;
       first += static_cast<int64_t>(gridDim.x) * kGroups) {
    const int64_t own = first + threadIdx.x / kLanes;
    const int64_t g = own < groups ? own : groups - 1;
    const auto at = [&](int64_t i) { return x(g, i); };
    const Numbers<kEach, decltype(at)> numbers(at, x.length(g), lane);
    const Fitted fitted = fitted_line(numbers, rule, lane);
    if (lane != 0 || own >= groups) continue;
    if (!fitted.good) atomicMin(first_bad, static_cast<unsigned long long>(g));
    out.inv[g] = fitted.line.inv;
    out.scale[g] = fitted.line.scale;
    out.zero[g] = fitted.line.zero;
  }
}

// The inverse steps of a grid that the caller gives.
__global__ void __launch_bounds__(kThreads)
    take_given(Source x, GridRule rule, Lines lines, unsigned long long* first_bad) {
  const int64_t groups = x.view.axis == 1 ? x.view.rows * x.view.groups_per_row : x.view.groups_per_row;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kGroups; first < groups;
       first += static_cast<int64_t>(gridDim.x) * kGroups) {
    const int64_t own = first + threadIdx.x / kLanes;
    const int64_t g = own < groups ? own : groups - 1;
    const auto at = [&](int64_t i) { return x(g, i); };
    const bool finite = range_of(Numbers<0, decltype(at)>(at, x.length(g), lane)).finite;
    if (lane != 0 || own >= groups) continue;
    if (!finite) atomicMin(first_bad, static_cast<unsigned long long>(g));
    const GridLine line = given_line(lines.scale[g], rule.sym ? symmetric_zero(rule.bits) : lines.zero[g]);
    lines.inv[g] = line.inv;
    lines.zero[g] = line.zero;
  }
}

// zeros and errors: kHqqIterations for each group; see grid_hqq in grid_ref.cc.
template <int kEach>
__global__ void __launch_bounds__(kThreads)
    solve_groups(Source x, int bits, Shrinkings shrinkings, Lines lines, float* zeros, float* errors) {
  const int64_t groups = x.view.axis == 1 ? x.view.rows * x.view.groups_per_row : x.view.groups_per_row;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const bool upper = lane >= kLanes / 2;
  const float top = top_code(bits);
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kGroups; first < groups;
       first += static_cast<int64_t>(gridDim.x) * kGroups) {
    const int64_t own = first + threadIdx.x / kLanes;
    const int64_t g = own < groups ? own : groups - 1;
    const int64_t n = x.length(g);
    const auto at = [&](int64_t i) { return x(g, i); };
    const Numbers<kEach, decltype(at)> numbers(at, n, lane);
    const float inv = lines.inv[g], scale = lines.scale[g];
    float zero = lines.zero[g];
    // Of iterations `lane` and `lane` + 16, to be written together.
    float zero_of[2] = {}, error_of[2] = {};
#pragma unroll 1
    for (int iteration = 0; iteration < kHqqIterations; ++iteration) {
      const Shrinking& shrinking = shrinkings.of[iteration];
      float shift = 0, distance = 0;
      numbers.each([&](float w) {
        const float q = code_of(w, inv, zero, top);
        const float d = w - (q - zero) * scale;
        float moved = w * inv;
        if (std::abs(d) > shrinking.zero_up_to) moved = (w - shrunk(d, shrinking)) * inv;
        shift += q - moved;
        distance += std::abs(d);
      });
      // The lower half of the lanes adds up the shifts of all, the upper one the distances.
      const float other = __shfl_xor_sync(kAll, upper ? shift : distance, kLanes / 2, kLanes);
      float sum = (upper ? distance : shift) + other;
#pragma unroll
      for (int apart = kLanes / 4; apart > 0; apart /= 2) sum += __shfl_xor_sync(kAll, sum, apart, kLanes);
      shift = __shfl_sync(kAll, sum, 0, kLanes);
      distance = __shfl_sync(kAll, sum, kLanes / 2, kLanes);
      if (inv == 0)
        distance = 0;
      else if constexpr (kEach > 0)
        zero = shift * (1.0f / static_cast<float>(kEach * kLanes));  // a power of two: as by division
      else
        zero = shift / static_cast<float>(n);
      if (iteration % kLanes == lane) {
        zero_of[1] = zero;
        error_of[1] = distance;
        if (iteration < kLanes) zero_of[0] = zero, error_of[0] = distance;
      }
    }
    for (int k = 0; k < 2; ++k) {
      const int iteration = lane + k * kLanes;
      if (own >= groups || iteration >= kHqqIterations) continue;
      zeros[g * kHqqIterations + iteration] = zero_of[k];
      errors[g * kHqqIterations + iteration] = error_of[k];
    }
  }
}

// How many of a group's numbers each lane has, where that is known when a kernel is compiled: Numbers.
template <class Body>
void with_each(const GridView& v, Body&& body) {
  const bool all_alike = v.axis == 0 || v.cols % v.group == 0;
  with_constant<1, 2, 4, 8, 0>(all_alike && v.group % kLanes == 0 ? v.group / kLanes : 0, body);
}

// The sum over the groups of each piece, one after the other.
__global__ void __launch_bounds__(kThreads)
    add_errors(const float* errors, int64_t pieces, int64_t per_row, int64_t groups_of_piece,
               int64_t groups_of_row, double* out) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < pieces * kHqqIterations;
       i += step) {
    const int64_t piece = i / kHqqIterations, iteration = i % kHqqIterations;
    const int64_t row = piece / per_row, begin = piece % per_row * groups_of_piece;
    const int64_t end = begin + groups_of_piece < groups_of_row ? begin + groups_of_piece : groups_of_row;
    double sum = 0;
    for (int64_t g = begin; g < end; ++g)
      sum += static_cast<double>(errors[(row * groups_of_row + g) * kHqqIterations + iteration]);
    out[piece * kHqqIterations + iteration] = sum;
  }
}

// The sum over the pieces, one after the other, as on the CPU. A thread for each iteration; what it adds next
// is on its way meanwhile.
__global__ void __launch_bounds__(32) add_pieces(const double* of_pieces, int64_t pieces, double* out) {
  constexpr int kAhead = 16;
  const int iteration = static_cast<int>(threadIdx.x);
  if (iteration >= kHqqIterations) return;
  double sum = 0;
  for (int64_t first = 0; first < pieces; first += kAhead) {
    double next[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
      next[k] = first + k < pieces ? of_pieces[(first + k) * kHqqIterations + iteration] : 0.0;
#pragma unroll
    for (int k = 0; k < kAhead; ++k) sum += next[k];  // errors are 0 or more: to add 0 changes nothing
  }
  out[iteration] = sum;
}

__global__ void __launch_bounds__(kThreads)
    take_iteration(const float* zeros, int64_t groups, int64_t iteration, GridRule rule, float* zero) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t g = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; g < groups; g += step)
    zero[g] = stored_zero(zeros[g * kHqqIterations + iteration], rule);
}

__device__ int64_t group_of(const GridView& v, int64_t row, int64_t col) {
  if (v.axis == 0) return col;
  const int64_t in_row =
      v.cols < kNarrowRow ? static_cast<uint32_t>(col) / static_cast<uint32_t>(v.group) : col / v.group;
  return row * v.groups_per_row + in_row;
}

// A block for each tile of a row of the view.
__global__ void __launch_bounds__(kThreads)
    encode_tiles(Source x, int bits, Lines lines, int64_t tiles, bool whole, uint8_t* packed) {
  __shared__ uint8_t codes[kTile];
  const GridView& v = x.view;
  const float top = top_code(bits);
  const int64_t row_bytes = packed_row_bytes(bits, v.cols);
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t i = blockIdx.x; i < v.rows * tiles; i += gridDim.x) {
    const int64_t row = i / tiles, begin = i % tiles * kTile;
    const int64_t end = begin + kTile < v.cols ? begin + kTile : v.cols;
    for (int64_t j = begin + thread; j < end; j += kThreads) {
      const int64_t g = group_of(v, row, j);
      codes[j - begin] = static_cast<uint8_t>(
          code_of(load(x.data, x.dtype, row * x.row_stride + j), lines.inv[g], lines.zero[g], top));
    }
    __syncthreads();
    uint8_t* out = packed + row * row_bytes;
    if (whole)
      pack_whole_tile(codes, begin, end, v.cols, bits, thread, kThreads,
                      [&](int64_t at, uint32_t word) { reinterpret_cast<uint32_t*>(out)[at] = word; });
    else
      pack_tile(codes, begin, end, v.cols, bits, thread, kThreads,
                [&](int64_t at, uint8_t byte) { out[at] = byte; });
    __syncthreads();
  }
}

constexpr int kWarps = kThreads / 32;
constexpr int kFours = kWarpCodes / (32 * 4);  // of a thread: the k'th of lane l has numbers 128 k + 4 l on

// 512 numbers of a row, which a warp has.
struct Piece {
  int64_t row;
  uint32_t begin;  // column
  int n;           // 256 at the end of a row, perhaps

  QUANTRATURE_INLINE Piece(uint32_t index, const Divider& per_row, uint32_t cols) {
    const uint32_t of_row = per_row.quotient(index);
    row = of_row;
    begin = (index - of_row * per_row.by) * kWarpCodes;
    n = static_cast<int>(cols - begin < kWarpCodes ? cols - begin : kWarpCodes);
  }
  QUANTRATURE_INLINE bool has(int k) const { return 128 * k < n; }
};

template <qtr_dtype kDtype>
__device__ __forceinline__ void read_piece(const Source& x, const Piece& piece, int lane,
                                           Four (&values)[kFours]) {
  const int64_t first = (piece.row * x.row_stride + piece.begin) / 4 + lane;
#pragma unroll
  for (int k = 0; k < kFours; ++k) values[k] = piece.has(k) ? load4(x.data, kDtype, first + 32 * k) : Four{};
}

// Codes of rows of whole blocks. A group is a multiple of four numbers or, by column, a column.
template <qtr_dtype kDtype, bool kByColumn>
__global__ void __launch_bounds__(kThreads) encode_blocks(Source x, int bits, Lines lines, uint32_t pieces,
                                                          Divider per_row, Divider group, uint8_t* packed) {
  __shared__ WarpCodes of_warp[kWarps];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const uint32_t index = blockIdx.x * kWarps + static_cast<uint32_t>(warp);
  if (index >= pieces) return;
  const uint32_t cols = static_cast<uint32_t>(x.view.cols);
  const Piece piece(index, per_row, cols);
  Four values[kFours];
  read_piece<kDtype>(x, piece, lane, values);
  const float top = top_code(bits);
#pragma unroll
  for (int k = 0; k < kFours; ++k) {
    if (!piece.has(k)) break;
    const uint32_t j = piece.begin + static_cast<uint32_t>(128 * k + 4 * lane);
    const int64_t g = kByColumn ? j : piece.row * x.view.groups_per_row + group.quotient(j);
    Four inv, zero;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      inv.v[e] = lines.inv[kByColumn ? g + e : g];
      zero.v[e] = lines.zero[kByColumn ? g + e : g];
    }
    of_warp[warp].words[WarpCodes::place(32 * k + lane)] = four_codes(values[k], inv, zero, top);
  }
  __syncwarp();
  write_codes(of_warp[warp], piece.n, bits, lane, packed + piece.row * bits * (cols / 8), cols / 8,
              piece.begin);
}

// Minmax, codes and packing in one pass over rows of whole blocks, with groups of a power of two numbers:
// what a warp reads stays in registers. Each lane ends with the line of one of the groups of its numbers.
template <qtr_dtype kDtype, int kGroup>
__global__ void __launch_bounds__(kThreads)
    quantize_blocks(Source x, GridRule rule, float* scale, float* zero, uint32_t pieces, Divider per_row,
                    uint8_t* packed, unsigned long long* first_bad) {
  constexpr int kOfGroup = kGroup < 128 ? kGroup / 4 : 32;     // lanes that share a group
  constexpr int kTogether = kGroup <= 128 ? 1 : kGroup / 128;  // fours of a lane in one group
  __shared__ WarpCodes of_warp[kWarps];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const uint32_t index = blockIdx.x * kWarps + static_cast<uint32_t>(warp);
  if (index >= pieces) return;
  const uint32_t cols = static_cast<uint32_t>(x.view.cols);
  const Piece piece(index, per_row, cols);
  Four values[kFours];
  read_piece<kDtype>(x, piece, lane, values);

  // Half of a group's lanes look for the least number, the others for the least of the negative ones.
  const bool upper = (lane & (kOfGroup / 2)) != 0;
  float not_finite = 0;  // 0 times a number is 0, if that is finite
  float least[kFours];
#pragma unroll
  for (int k = 0; k < kFours; ++k) {
    const float (&v)[4] = values[k].v;
    for (int e = 0; e < 4; ++e) not_finite = std::fma(v[e], 0.0f, not_finite);
    const float low = fminf(fminf(v[0], v[1]), fminf(v[2], v[3]));
    const float minus_high = -fmaxf(fmaxf(v[0], v[1]), fmaxf(v[2], v[3]));
    const float other = __shfl_xor_sync(kAll, upper ? low : minus_high, kOfGroup / 2);
    least[k] = fminf(upper ? minus_high : low, other);
#pragma unroll
    for (int apart = kOfGroup / 4; apart > 0; apart /= 2)
      least[k] = fminf(least[k], __shfl_xor_sync(kAll, least[k], apart));
  }
#pragma unroll
  for (int k = 0; k < kFours; k += kTogether)
#pragma unroll
    for (int other = 1; other < kTogether; ++other) least[k] = fminf(least[k], least[k + other]);

  // Lane l takes the group of four l % 4; its neighbour half a group away has the other extreme.
  const int own = lane % kFours / kTogether * kTogether;
  float mine = 0, others = 0;
#pragma unroll
  for (int k = 0; k < kFours; k += kTogether) {
    mine = k == own ? least[k] : mine;
    if constexpr (kOfGroup == kFours) {  // the neighbour takes another group
      const float other = __shfl_xor_sync(kAll, least[k], kOfGroup / 2);
      others = k == own ? other : others;
    }
  }
  if constexpr (kOfGroup > kFours) others = __shfl_xor_sync(kAll, mine, kOfGroup / 2);
  const float low = upper ? others : mine, high = upper ? -mine : -others;
  const GridLine line = line_of_range(low, high, rule);
  const bool writes = lane % kOfGroup == own && piece.has(own);
  const int64_t at = piece.row * x.view.groups_per_row +
                     (piece.begin + 128 * static_cast<uint32_t>(own)) / kGroup + lane / kOfGroup;
  if (not_finite != 0.0f || (writes && !range_is_finite(low, high, rule.sym)))
    atomicMin(first_bad, static_cast<unsigned long long>(at));
  if (writes) {
    scale[at] = line.scale;
    if (!rule.sym) zero[at] = line.zero;
  }
  const float top = top_code(rule.bits);
#pragma unroll
  for (int k = 0; k < kFours; ++k) {
    const int from = lane / kOfGroup * kOfGroup + k / kTogether * kTogether;
    const float i = __shfl_sync(kAll, line.inv, from), z = __shfl_sync(kAll, line.zero, from);
    of_warp[warp].words[WarpCodes::place(32 * k + lane)] =
        four_codes(values[k], {{i, i, i, i}}, {{z, z, z, z}}, top);
  }
  __syncwarp();
  write_codes(of_warp[warp], piece.n, rule.bits, lane, packed + piece.row * rule.bits * (cols / 8), cols / 8,
              piece.begin);
}

// A copy of all numbers in which the excluded ones are within the range of the rest of their group.
__global__ void __launch_bounds__(kThreads) clamp_excluded(Source x, const uint8_t* mask, float* out) {
  const int64_t groups = x.view.axis == 1 ? x.view.rows * x.view.groups_per_row : x.view.groups_per_row;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kGroups; first < groups;
       first += static_cast<int64_t>(gridDim.x) * kGroups) {
    const int64_t own = first + threadIdx.x / kLanes;
    const int64_t g = own < groups ? own : groups - 1;
    const int64_t n = x.length(g);
    // The mask and the copy have no gaps between rows.
    const Source flat{nullptr, QTR_F32, x.view, x.view.cols};
    float low = std::numeric_limits<float>::infinity(), high = -low;
    for (int64_t i = lane; i < n; i += kLanes) {
      if (mask[flat.place(g, i)] != 0) continue;
      const float v = x(g, i);
      low = v < low ? v : low;
      high = v > high ? v : high;
    }
    low = least_of_lanes(low);
    high = -least_of_lanes(-high);
    if (low > high) low = high = 0;
    if (own >= groups) continue;
    for (int64_t i = lane; i < n; i += kLanes) {
      float v = x(g, i);
      if (mask[flat.place(g, i)] != 0 && is_finite(v)) v = v < low ? low : v > high ? high : v;
      out[flat.place(g, i)] = v;
    }
  }
}

unsigned grid_of(int64_t n, int64_t each = kThreads) {
  return blocks_for(std::min<int64_t>(ceil_div(n, each), 1 << 16));
}

// Blocks for parts of rows: enough of them, and not more than a grid has.
dim3 pieces_of_rows(const GridView& v) {
  return {static_cast<unsigned>(std::min<int64_t>(ceil_div(v.cols, kThreads), 1 << 16)),
          static_cast<unsigned>(std::min<int64_t>(v.rows, 1 << 15))};
}

[[noreturn]] void refuse(const qtr_matrix& w, unsigned long long group, cudaStream_t stream) {
  refuse_not_finite(w, "quantize", "w", stream);
  throw Refused("[quantize] the range of a group must be finite in float32: got group=" +
                std::to_string(group));
}

// Where the clamped copy is, and what is wrong with the positions.
void exclude(const qtr_quantize_args& a, Source& x, Scratch<float>& copy, cudaStream_t stream) {
  Scratch<uint8_t> mask(a.w.rows * a.w.cols, stream);
  mark_excluded({a.exclude_row_offsets, a.exclude_columns, a.w.rows, a.w.cols}, "quantize", mask, stream);
  launch(clamp_excluded, grid_of(x.view.groups(), kGroups), kThreads, 0, stream, x,
         static_cast<const uint8_t*>(mask.get()), copy.get());
  x = Source{copy.get(), QTR_F32, x.view, x.view.cols};
}

void solve_hqq(const Source& x, const GridRule& rule, float least, const Lines& lines, cudaStream_t stream) {
  const GridPieces pieces(x.view);
  const int64_t groups = x.view.groups();
  Scratch<float> zeros(groups * kHqqIterations, stream), errors(groups * kHqqIterations, stream);
  Scratch<double> of_pieces(pieces.count() * kHqqIterations, stream), sums(kHqqIterations, stream);
  with_each(x.view, [&](auto each) {
    launch(solve_groups<each.value>, grid_of(groups, kGroups), kThreads, 0, stream, x, rule.bits,
           Shrinkings(rule.shrinks), lines, zeros.get(), errors.get());
  });
  const bool rows = x.view.axis == 1;
  launch(add_errors, grid_of(pieces.count() * kHqqIterations), kThreads, 0, stream,
         static_cast<const float*>(errors.get()), pieces.count(), pieces.per_row,
         rows ? ceil_div(pieces.span, x.view.group) : pieces.span, x.view.groups_per_row, of_pieces.get());
  launch(add_pieces, 1, 32, 0, stream, static_cast<const double*>(of_pieces.get()), pieces.count(),
         sums.get());
  double of_iterations[kHqqIterations];
  sums.read(of_iterations, kHqqIterations);
  const double size = static_cast<double>(x.view.rows) * static_cast<double>(x.view.cols);
  launch(take_iteration, grid_of(groups), kThreads, 0, stream, static_cast<const float*>(zeros.get()), groups,
         last_iteration(of_iterations, size, least), rule, lines.zero);
}

// Rows of any shape, code by code. A block has a part of a row, or of some rows one after the other.
__global__ void __launch_bounds__(kThreads)
    decode(const uint8_t* packed, int bits, GridView v, qtr_matrix scale, qtr_matrix zero,
           qtr_mutable_matrix out) {
  const int64_t row_bytes = packed_row_bytes(bits, v.cols);
  for (int64_t row = blockIdx.y; row < v.rows; row += gridDim.y)
    for (int64_t col = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; col < v.cols;
         col += static_cast<int64_t>(gridDim.x) * kThreads) {
      const int64_t g = group_of(v, row, col);
      const float z = zero.data == nullptr ? symmetric_zero(bits) : load(zero.data, zero.dtype, g);
      const float code = static_cast<float>(code_at(packed + row * row_bytes, bits, v.cols, col));
      store(out.data, out.dtype, row * out.row_stride + col, (code - z) * load(scale.data, scale.dtype, g));
    }
}

// What a thread of decode_blocks has: codes that make 16 bytes, of some rows.
constexpr int kRowsOfThread = 4;
constexpr int codes_of_thread(qtr_dtype dtype) {
  return dtype == QTR_F32 ? 4 : 8;
}

struct DecodeBlocks {
  const uint8_t* packed;
  int64_t rows, row_bytes, groups_per_row;
  Divider per_row, group;  // threads of a row; numbers of a group, on axis 1
  uint32_t count;          // of threads
  qtr_matrix scale, zero;
  void* out;
  int64_t out_stride;
};

// 16 bytes of numbers. They share a line, or each has its own.
template <qtr_dtype kOut, int kCodes, int kLines>
__device__ __forceinline__ uint4 values_of(const uint32_t (&codes)[kCodes / 4], const float (&scale)[kLines],
                                           const float (&zero)[kLines]) {
  float value[kCodes];
#pragma unroll
  for (int k = 0; k < kCodes; ++k)
    value[k] =
        (code_as_float(codes[k / 4], static_cast<uint32_t>(k % 4)) - zero[k % kLines]) * scale[k % kLines];
  uint32_t words[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if constexpr (kOut == QTR_F32)
      words[k] = std::bit_cast<uint32_t>(value[k]);
    else
      words[k] = two_halves<kOut>(value[2 * k], value[2 * k + 1]);
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// Steps or zeros from the given places on. The dtype is asked once, so that no branch stands between the
// loads.
template <int kRows, int kLines>
__device__ __forceinline__ void read_lines(const qtr_matrix& from, const int64_t (&places)[kRows],
                                           float otherwise, float (&values)[kRows][kLines]) {
  const auto read = [&](auto&& value_at) {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int k = 0; k < kLines; ++k) values[r][k] = value_at(places[r] + k);
  };
  if (from.data == nullptr)
    read([&](int64_t) { return otherwise; });
  else if (from.dtype == QTR_F32)
    read([&](int64_t at) { return load(from.data, QTR_F32, at); });
  else
    read([&](int64_t at) { return load(from.data, from.dtype, at); });
}

// Rows of whole blocks, whose groups are whole numbers of what a thread has of a row. All loads come before
// the first store, so that many bytes are on their way at a time; for rows that there are not, the last one
// is read.
template <int kBits, qtr_dtype kOut, bool kByColumn>
__global__ void __launch_bounds__(kThreads) decode_blocks(DecodeBlocks a) {
  constexpr int kCodes = codes_of_thread(kOut), kLines = kByColumn ? kCodes : 1;
  constexpr int kLineRows = kByColumn ? 1 : kRowsOfThread;
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= a.count) return;
  const uint32_t of_rows = a.per_row.quotient(i), j = (i - of_rows * a.per_row.by) * kCodes;
  const int64_t first = static_cast<int64_t>(of_rows) * kRowsOfThread;
  int64_t rows[kRowsOfThread], lines[kLineRows];
#pragma unroll
  for (int r = 0; r < kRowsOfThread; ++r) rows[r] = first + r < a.rows ? first + r : a.rows - 1;
#pragma unroll
  for (int r = 0; r < kLineRows; ++r)
    lines[r] = kByColumn ? j : rows[r] * a.groups_per_row + a.group.quotient(j);
  float scale[kLineRows][kLines], zero[kLineRows][kLines];
  read_lines(a.scale, lines, 0.0f, scale);
  read_lines(a.zero, lines, symmetric_zero(kBits), zero);
  uint32_t codes[kRowsOfThread][kCodes / 4];
#pragma unroll
  for (int r = 0; r < kRowsOfThread; ++r)
    read_codes<kBits, kCodes>(a.packed + rows[r] * a.row_bytes, a.per_row.by * (kCodes / 4) / 2, j, codes[r]);
#pragma unroll
  for (int r = 0; r < kRowsOfThread; ++r) {
    constexpr int64_t kSize = kOut == QTR_F32 ? 4 : 2;
    if (first + r >= a.rows) continue;
    char* to = static_cast<char*>(a.out) + ((first + r) * a.out_stride + j) * kSize;
    const int line = kByColumn ? 0 : r;
    *reinterpret_cast<uint4*>(to) = values_of<kOut, kCodes, kLines>(codes[r], scale[line], zero[line]);
  }
}

bool aligned(const void* data, qtr_dtype dtype) {
  return reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(4 * bytes_of(dtype)) == 0;
}

}  // namespace

void quantize(const qtr_quantize_args& a) {
  const cudaStream_t stream = stream_of(a.device);
  const GridView view = grid_view(a.w.rows, a.w.cols, a.group_size, a.axis);
  const GridRule rule = rule_of(a);
  Source x{a.w.data, a.w.dtype, view, a.axis == 1 ? a.w.row_stride : view.cols};
  const bool excludes = a.exclude_row_offsets != nullptr;
  Scratch<float> copy(excludes ? a.w.rows * a.w.cols : 0, stream);
  if (excludes) exclude(a, x, copy, stream);

  Scratch<unsigned long long> first_bad(1, stream);
  first_bad.fill_bytes(0xFF, 1);
  const int64_t groups = view.groups(), tiles = ceil_div(view.cols, kTile);
  const bool whole = whole_tiles(a.codes, view.cols);
  const int64_t per_row = ceil_div(view.cols, kWarpCodes), pieces = view.rows * per_row;
  const unsigned blocks = static_cast<unsigned>(ceil_div(pieces, kWarps));
  const bool by_block = whole && pieces < kMostDivided && view.cols < kMostDivided && x.row_stride % 4 == 0 &&
                        aligned(x.data, x.dtype) && (a.axis == 0 || view.group % 4 == 0);
  const bool at_once = by_block && a.axis == 1 && a.solver == QTR_MINMAX && view.group >= 16 &&
                       view.group <= kWarpCodes && std::has_single_bit(static_cast<uint64_t>(view.group)) &&
                       view.cols % view.group == 0;
  if (at_once) {
    with_dtype(x.dtype, [&](auto dtype) {
      with_constant<16, 32, 64, 128, 256, 512>(view.group, [&](auto group) {
        launch(quantize_blocks<dtype.value, group.value>, blocks, kThreads, 0, stream, x, rule, a.scale,
               a.zero, static_cast<uint32_t>(pieces), Divider(per_row), a.codes, first_bad.get());
      });
    });
  } else {
    Scratch<float> inv(groups, stream), own_zero(a.sym ? groups : 0, stream);
    const Lines lines{inv.get(), a.sym ? own_zero.get() : a.zero, a.scale};
    if (a.solver == QTR_GIVEN)
      launch(take_given, grid_of(groups, kGroups), kThreads, 0, stream, x, rule, lines, first_bad.get());
    else
      with_each(view, [&](auto each) {
        launch(fit_groups<each.value>, grid_of(groups, kGroups), kThreads, 0, stream, x, rule, lines,
               first_bad.get());
      });
    if (is_hqq(a.solver)) solve_hqq(x, rule, first_limit(a.solver), lines, stream);
    if (by_block)
      with_dtype(x.dtype, [&](auto dtype) {
        const auto start = [&](auto kernel) {
          launch(kernel, blocks, kThreads, 0, stream, x, a.bits, lines, static_cast<uint32_t>(pieces),
                 Divider(per_row), Divider(a.axis == 0 ? 1 : view.group), a.codes);
        };
        if (a.axis == 0)
          start(encode_blocks<dtype.value, true>);
        else
          start(encode_blocks<dtype.value, false>);
      });
    else
      launch(encode_tiles, blocks_for(view.rows * tiles), kThreads, 0, stream, x, a.bits, lines, tiles, whole,
             a.codes);
  }
  unsigned long long bad = 0;
  first_bad.read(&bad, 1);
  if (bad != ~0ull) refuse(a.w, bad, stream);
}

void dequantize(const qtr_dequantize_args& a) {
  const GridView view = grid_view(a.out.rows, a.out.cols, a.group_size, a.axis);
  qtr_mutable_matrix out = a.out;
  if (a.axis == 0) out = {a.out.data, view.rows, view.cols, view.cols, a.out.dtype};
  const cudaStream_t stream = stream_of(a.device);
  const int codes = codes_of_thread(out.dtype);
  const int64_t count = ceil_div(view.rows, kRowsOfThread) * (view.cols / codes);
  const bool by_column = a.axis == 0;
  if (!whole_tiles(a.codes, view.cols) || view.cols >= kMostDivided || out.row_stride % codes != 0 ||
      reinterpret_cast<uintptr_t>(out.data) % 16 != 0 || count >= kMostDivided ||
      (!by_column && view.group % codes != 0))
    return launch(decode, pieces_of_rows(view), kThreads, 0, stream, a.codes, a.bits, view, a.scale, a.zero,
                  out);
  const DecodeBlocks blocks{a.codes,
                            view.rows,
                            packed_row_bytes(a.bits, view.cols),
                            view.groups_per_row,
                            Divider(view.cols / codes),
                            Divider(by_column ? 1 : view.group),
                            static_cast<uint32_t>(count),
                            a.scale,
                            a.zero,
                            out.data,
                            out.row_stride};
  const auto start = [&](auto kernel) {
    launch(kernel, static_cast<unsigned>(ceil_div(count, kThreads)), kThreads, 0, stream, blocks);
  };
  with_bits(a.bits, [&](auto bits) {
    with_dtype(out.dtype, [&](auto dtype) {
      if (by_column)
        start(decode_blocks<bits.value, dtype.value, true>);
      else
        start(decode_blocks<bits.value, dtype.value, false>);
    });
  });
}

}  // namespace quantrature::cuda
