// GPTQ's codes. Rows do not depend on each other: a warp takes a row through the columns of a block one after
// the other, then a product of matrices adds the errors of the block to the columns behind it. Each sum is
// taken in the order of the columns, fused, and so has the bits that it has on the CPU.
#include <numeric>
#include <vector>

#include "backend.cuh"
#include "device/elements.cuh"
#include "exclude.cuh"
#include "finite.cuh"
#include "fit.cuh"
#include "launch.cuh"
#include "ops/gptq/columns.hpp"
#include "ops/grid/line.hpp"

namespace quantrature::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kBlock = 128;           // columns that a warp takes in turn
constexpr int kOwn = kBlock / kWarp;  // of a lane
constexpr int kRows = 16;             // of a block of threads, a warp each
constexpr int kPanel = static_cast<int>(kGptqColumns);

struct Span {
  int64_t begin, end;  // places in the order of the columns

  __host__ __device__ int64_t size() const { return end - begin; }
};

// The factor A: panel p has rows j < 8 (p + 1) of columns 8 p to 8 p + 7, or as many rows as there are.
struct Feedback {
  const float* panels;
  int64_t rows;  // of each panel; 0 where they differ

  static __host__ __device__ int64_t offset(int64_t p) { return p * (p + 1) / 2 * kPanel * kPanel; }
  __device__ const float* row(int64_t p, int64_t j) const {
    return panels + (rows > 0 ? p * rows * kPanel : offset(p)) + j * kPanel;
  }
  __device__ float operator()(int64_t j, int64_t k) const { return row(k / kPanel, j)[k % kPanel]; }
};

// One number for each row and place, from a place on that is a multiple of 8; rows are a multiple of 8 apart.
struct Places {
  float* data;
  int64_t stride, first;

  __device__ float* at(int64_t row, int64_t place) const { return data + row * stride + place - first; }
};

int64_t stride_of(int64_t columns) {
  return ceil_div(columns + kPanel, 16) * 16;
}

// What the grid of a column is, and where.
struct Lines {
  qtr_matrix scale, zero;  // of all groups in one row
  int64_t group, groups_per_row;
  int bits;

  __device__ GridLine operator()(int64_t row, int64_t column) const {
    const int64_t g = row * groups_per_row + column / group;
    return given_line(load(scale.data, scale.dtype, g),
                      zero.data == nullptr ? symmetric_zero(bits) : load(zero.data, zero.dtype, g));
  }
};

// Weights in the order of the columns.
__global__ void __launch_bounds__(kThreads)
    arrange(qtr_matrix w, const int32_t* columns, Places sums, Places errors) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < w.rows * w.cols;
       i += step) {
    const int64_t row = i / w.cols, place = i % w.cols;
    *sums.at(row, place) = *errors.at(row, place) =
        load(w.data, w.dtype, row * w.row_stride + columns[place]);
  }
}

// What the columns of a block add to each other: A_jk at kBlock (j - begin) + k - begin, for j < k.
__device__ void take_feedback(const Feedback& feedback, const Span& block, float* to) {
  for (int i = static_cast<int>(threadIdx.x); i < block.size() * kBlock; i += kRows * kWarp) {
    const int j = i / kBlock, k = i % kBlock;
    to[i] = j < k && k < block.size() ? feedback(block.begin + j, block.begin + k) : 0.0f;
  }
  __syncthreads();
}

// The columns of a block, one after the other. sums: x_k as far as columns before the block go; becomes
// x_k - v_k. errors: w; becomes w - v.
__global__ void __launch_bounds__(kRows* kWarp)
    take_columns(Places sums, Places errors, Feedback feedback, Span block, int64_t rows, Lines lines,
                 const int32_t* columns, int64_t cols, const uint8_t* exact, uint8_t* codes) {
  float* const between = static_cast<float*>(dynamic_shared());
  take_feedback(feedback, block, between);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kWarp;
  if (row >= rows) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, count = static_cast<int>(block.size());
  const float top = top_code(lines.bits);
  float x[kOwn], w[kOwn], code[kOwn];
  GridLine line[kOwn];
  bool kept[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int k = i * kWarp + lane;
    x[i] = w[i] = code[i] = 0;
    line[i] = {0, 0, 0};
    kept[i] = false;
    if (k >= count) continue;
    const int64_t column = columns[block.begin + k];
    x[i] = *sums.at(row, block.begin + k);
    w[i] = *errors.at(row, block.begin + k);
    line[i] = lines(row, column);
    kept[i] = exact != nullptr && exact[row * cols + column] != 0;
  }
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int own = count - i * kWarp < kWarp ? count - i * kWarp : kWarp;
    for (int j = 0; j < own; ++j) {
      const float near = std::nearbyint((kept[i] ? w[i] : x[i]) * line[i].inv + line[i].zero);
      const float positive = near > 0 ? near : 0.0f;  // no number becomes 0
      const float mine = positive < top ? positive : top;
      const float value = kept[i] ? w[i] : (mine - line[i].zero) * line[i].scale;
      if (lane == j) {
        code[i] = mine;
        x[i] -= value;
        w[i] -= value;
      }
      const float error = __shfl_sync(kAll, w[i], j);
      const float* const a = between + (i * kWarp + j) * kBlock + lane;
      if (lane > j) x[i] = __fmaf_rn(error, a[i * kWarp], x[i]);
#pragma unroll
      for (int next = i + 1; next < kOwn; ++next) x[next] = __fmaf_rn(error, a[next * kWarp], x[next]);
    }
  }
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int k = i * kWarp + lane;
    if (k >= count) continue;
    *sums.at(row, block.begin + k) = x[i];
    *errors.at(row, block.begin + k) = w[i];
    codes[row * cols + columns[block.begin + k]] = static_cast<uint8_t>(code[i]);
  }
}

// The numbers y to which a grid is fitted, of the columns of a block. y: as far as columns before the block
// go. moves: w - y. Products of columns of one panel are not fused, as on the CPU.
__global__ void __launch_bounds__(kRows* kWarp)
    move_columns(Places y, Places moves, Places errors, Feedback feedback, Span block, int64_t rows) {
  float* const between = static_cast<float*>(dynamic_shared());
  take_feedback(feedback, block, between);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / kWarp;
  if (row >= rows) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, count = static_cast<int>(block.size());
  const int before = static_cast<int>(block.begin % kPanel);  // columns of the first panel before the block
  float now[kOwn], w[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int k = i * kWarp + lane;
    now[i] = k < count ? *y.at(row, block.begin + k) : 0.0f;
    w[i] = k < count ? *errors.at(row, block.begin + k) : 0.0f;
  }
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int own = count - i * kWarp < kWarp ? count - i * kWarp : kWarp;
    for (int j = 0; j < own; ++j) {
      const float move = __shfl_sync(kAll, w[i] - now[i], j);
      const float* const a = between + (i * kWarp + j) * kBlock + lane;
      const int panel = (i * kWarp + j + before) / kPanel;
#pragma unroll
      for (int next = i; next < kOwn; ++next) {
        if (next == i && lane <= j) continue;
        const float factor = a[next * kWarp];
        now[next] = (next * kWarp + lane + before) / kPanel == panel ? now[next] + move * factor
                                                                     : __fmaf_rn(move, factor, now[next]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int k = i * kWarp + lane;
    if (k >= count) continue;
    *y.at(row, block.begin + k) = now[i];
    *moves.at(row, block.begin + k) = w[i] - now[i];
  }
}

constexpr int kSide = 128;                            // of a tile of sums
constexpr int kDepth = 8;                             // columns whose errors are added at a time
constexpr int kEach = 8;                              // rows and columns of a thread
constexpr int kLeft = kSide + 4, kRight = kSide + 8;  // between rows in shared memory, apart in its banks

__device__ __forceinline__ float4 four_at(const float* at) {
  return *reinterpret_cast<const float4*>(at);
}

// sums += errors A, for columns `from` of errors and rows `from` of A, in their order; a tile of rows and
// columns `to` a block.
__global__ void __launch_bounds__(kThreads, 2)
    add_feedback(Places sums, Places errors, Feedback feedback, int64_t rows, Span from, Span to) {
  alignas(16) __shared__ float left[2][kDepth * kLeft], right[2][kDepth * kRight];
  const int thread = static_cast<int>(threadIdx.x), tx = thread % 16 * 4, ty = thread / 16 * 4;
  const int64_t base = to.begin / kPanel * kPanel;
  const unsigned across = static_cast<unsigned>((to.end - base + kSide - 1) / kSide);
  const int64_t first_row = static_cast<int64_t>(blockIdx.x / across) * kSide;
  const int64_t first = base + static_cast<int64_t>(blockIdx.x % across) * kSide;
  // A thread has four rows and columns, and the four that are half a tile away.
  float* const mine = sums.at(first_row + ty, first + tx);
  const int rows_left = static_cast<int>(rows - first_row < kSide ? rows - first_row : kSide) - ty;
  const int begin = static_cast<int>(to.begin - first) - tx;
  const int end = static_cast<int>(to.end - first < kSide ? to.end - first : kSide) - tx;
  const auto each_four = [&](const auto& body) {
#pragma unroll
    for (int i = 0; i < kEach; ++i)
#pragma unroll
      for (int k = 0; k < kEach; k += 4) {
        const int row = i / 4 * (kSide / 2) + i % 4, col = k / 4 * (kSide / 2);
        if (row < rows_left) body(i, k, mine + row * sums.stride + col, col);
      }
  };

  float sum[kEach][kEach] = {};
  each_four([&](int i, int k, const float* at, int col) {
    if (col >= begin && col + 4 <= end) {
      const float4 four = four_at(at);
      sum[i][k] = four.x, sum[i][k + 1] = four.y, sum[i][k + 2] = four.z, sum[i][k + 3] = four.w;
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (col + e >= begin && col + e < end) sum[i][k + e] = at[e];
    }
  });

  // Four errors of a row and four numbers of a row of A are read ahead of the products. What lies beyond the
  // last row or panel is not stored: the last is read in its place.
  const int64_t start = from.begin / kPanel * kPanel, panels = (to.end + kPanel - 1) / kPanel;
  const int error_row = thread / 2, error_column = thread % 2 * 4, depth = thread % 16 / 2;
  const int64_t row = first_row + error_row < rows ? first_row + error_row : rows - 1;
  const int64_t panel = first / kPanel + thread / 16 < panels ? first / kPanel + thread / 16 : panels - 1;
  const float* next_left = errors.at(row, start + error_column);
  const float* next_right = feedback.row(panel, start + depth) + thread % 2 * 4;
  int left_over = static_cast<int>(from.end - start);
  float4 l, r;
  const auto read = [&] {
    l = error_column < left_over ? four_at(next_left) : make_float4(0, 0, 0, 0);
    r = depth < left_over ? four_at(next_right) : make_float4(0, 0, 0, 0);
    next_left += kDepth;
    next_right += kDepth * kPanel;
  };
  read();
  int skipped = static_cast<int>(from.begin - start);
  for (int side = 0; left_over > 0; side = 1 - side) {
    float* const to_left = left[side] + error_column * kLeft + error_row;
    to_left[0] = l.x, to_left[kLeft] = l.y, to_left[2 * kLeft] = l.z, to_left[3 * kLeft] = l.w;
    *reinterpret_cast<float4*>(right[side] + depth * kRight + thread / 16 * kPanel + thread % 2 * 4) = r;
    __syncthreads();
    const int now = left_over < kDepth ? left_over : kDepth;
    left_over -= kDepth;
    if (left_over > 0) read();
    const auto multiply = [&](int d) {
      float a[kEach], b[kEach];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float4 x = four_at(left[side] + d * kLeft + half * (kSide / 2) + ty);
        const float4 y = four_at(right[side] + d * kRight + half * (kSide / 2) + tx);
        a[4 * half] = x.x, a[4 * half + 1] = x.y, a[4 * half + 2] = x.z, a[4 * half + 3] = x.w;
        b[4 * half] = y.x, b[4 * half + 1] = y.y, b[4 * half + 2] = y.z, b[4 * half + 3] = y.w;
      }
#pragma unroll
      for (int i = 0; i < kEach; ++i)
#pragma unroll
        for (int k = 0; k < kEach; ++k) sum[i][k] = __fmaf_rn(a[i], b[k], sum[i][k]);
    };
    if (now - skipped == kDepth) {
#pragma unroll 2  // more of them spill registers
      for (int d = 0; d < kDepth; ++d) multiply(d);
    } else {
#pragma unroll 1
      for (int d = skipped; d < now; ++d) multiply(d);
    }
    skipped = 0;
  }

  each_four([&](int i, int k, float* at, int col) {
    if (col >= begin && col + 4 <= end) {
      *reinterpret_cast<float4*>(at) = make_float4(sum[i][k], sum[i][k + 1], sum[i][k + 2], sum[i][k + 3]);
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (col + e >= begin && col + e < end) at[e] = sum[i][k + e];
    }
  });
}

// The grids of a group, one a row. first_bad: the least key of a row without one.
__global__ void __launch_bounds__(kThreads)
    fit_rows(Places y, Span places, int64_t rows, GridRule rule, const uint8_t* exact, const int32_t* columns,
             int64_t cols, bool half, int64_t group, int64_t groups_per_row, int64_t turn, float* scale,
             float* zero, unsigned long long* first_bad) {
  constexpr int kAtOnce = kThreads / kLanes;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int64_t n = places.size();
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kAtOnce; first < rows;
       first += static_cast<int64_t>(gridDim.x) * kAtOnce) {
    const int64_t own = first + threadIdx.x / kLanes;
    const int64_t row = own < rows ? own : rows - 1;
    const auto excluded = [&](int64_t i) {
      return exact != nullptr && exact[row * cols + columns[places.begin + i]] != 0;
    };
    // Excluded positions count as the nearest number between the extremes of the rest.
    float low = std::numeric_limits<float>::infinity(), high = -low;
    if (exact != nullptr) {
      for (int64_t i = lane; i < n; i += kLanes) {
        const float v = *y.at(row, places.begin + i);
        if (excluded(i)) continue;
        low = v < low ? v : low;
        high = v > high ? v : high;
      }
      low = least_of_lanes(low);
      high = -least_of_lanes(-high);
      if (low > high) low = high = 0;
    }
    const auto at = [&](int64_t i) {
      const float v = *y.at(row, places.begin + i);
      return !excluded(i) ? v : v < low ? low : v > high ? high : v;
    };
    const Fitted fitted = fitted_line(Numbers<0, decltype(at)>(at, n, lane), rule, lane);
    if (lane != 0 || own >= rows) continue;
    // The CPU comes upon strips one by one, and in each upon a group, then its rows.
    if (!fitted.good)
      atomicMin(first_bad, static_cast<unsigned long long>(
                               (row / kGptqStrip * groups_per_row + turn) * kGptqStrip + row % kGptqStrip));
    const auto stored = [&](float v) { return half ? f32_from_f16(f16_from_f32(v)) : v; };
    scale[row * groups_per_row + group] = stored(fitted.line.scale);
    if (zero != nullptr) zero[row * groups_per_row + group] = stored(fitted.line.zero);
  }
}

// Squared errors as the CPU adds them: those of a column over the rows of a piece, then those of the columns
// of a span. starts: where spans begin, and the end of the last.
__global__ void __launch_bounds__(kThreads) add_losses(Places sums, int64_t rows, const int32_t* starts,
                                                       int64_t spans, const double* pivots, double* out) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t pieces = (rows + kGptqRows - 1) / kGptqRows;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < pieces * spans; i += step) {
    const int64_t begin = i / spans * kGptqRows, span = i % spans;
    const int64_t end = begin + kGptqRows < rows ? begin + kGptqRows : rows;
    double loss = 0;
    for (int64_t k = starts[span]; k < starts[span + 1]; ++k) {
      double sum = 0;
      for (int64_t row = begin; row < end; ++row) {
        const double apart = static_cast<double>(*sums.at(row, k));
        sum += apart * apart;
      }
      loss += sum * pivots[k];
    }
    out[i] = loss;
  }
}

unsigned grid_of(int64_t n, int64_t each = kThreads) {
  return blocks_for(std::min<int64_t>(ceil_div(n, each), 1 << 16));
}

void refuse_grid(const qtr_matrix& m, const char* name, cudaStream_t stream) {
  if (m.data == nullptr) return;
  const int64_t g = first_not_finite(m, stream);
  if (g >= 0)
    throw Refused(std::string("[gptq] ") + name + " must be finite: got value=" + number_at(m, 0, g, stream) +
                  ", group=" + std::to_string(g));
}

// One call.
class Solver {
 public:
  explicit Solver(const qtr_gptq_columns_args& args)
      : all_(args),
        a_(args.of),
        rows_(a_.w.rows),
        cols_(a_.w.cols),
        group_(a_.group_size == -1 ? cols_ : std::min(a_.group_size, cols_)),
        groups_per_row_(ceil_div(cols_, group_)),
        fitted_(a_.fitted_scale != nullptr),
        stream_(stream_of(args.device)),
        sums_(rows_ * stride_of(cols_), stream_),
        errors_(rows_ * stride_of(cols_), stream_),
        panels_(a_.factor == nullptr ? Feedback::offset(ceil_div(cols_, kPanel)) : 0, stream_),
        columns_(cols_, stream_),
        codes_(rows_ * cols_, stream_),
        exact_(a_.exclude_row_offsets == nullptr ? 0 : rows_ * cols_, stream_) {
    refuse_not_finite(a_.w, "gptq", "w", stream_);
    refuse_grid(a_.scale, "scale", stream_);
    refuse_grid(a_.zero, "zero", stream_);
    if (a_.exclude_row_offsets != nullptr)
      mark_excluded({a_.exclude_row_offsets, a_.exclude_columns, rows_, cols_}, "gptq", exact_, stream_);
    const std::vector<int32_t> columns(all_.order, all_.order + cols_);
    columns_.write(columns.data(), cols_);
    if (a_.factor == nullptr) panels_.write(all_.panels, Feedback::offset(ceil_div(cols_, kPanel)));
    launch(arrange, grid_of(rows_ * cols_), kThreads, 0, stream_, a_.w, columns_.get(), sums(), errors());
    expect(cudaFuncSetAttribute(take_columns, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared),
           "asking for shared memory");
    expect(cudaFuncSetAttribute(move_columns, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared),
           "asking for shared memory");
  }

  void run() {
    const std::vector<Span> groups = fitted_ ? groups_in_turn() : std::vector<Span>{{0, cols_}};
    Scratch<unsigned long long> first_bad(1, stream_);
    first_bad.fill_bytes(0xFF, 1);
    // Errors of columns from `begun` on have been added to columns before `near` alone: small groups wait for
    // each other, until there are enough of them for a product of good size.
    int64_t begun = 0, near = 0;
    for (size_t g = 0; g < groups.size(); ++g) {
      if (fitted_) fit(groups[g], static_cast<int64_t>(g), first_bad.get());
      for (Span block = block_of(groups[g].begin, groups[g]); block.size() > 0;
           block = block_of(block.end, groups[g])) {
        if (begun == block.begin) {
          near = block.end;
          for (size_t more = g; near - begun < kBlock && more < groups.size() && block.end == groups[g].end;
               ++more)
            near = groups[more].end;
        }
        launch(take_columns, blocks_for(ceil_div(rows_, kRows)), kRows * kWarp, kShared, stream_, sums(),
               errors(), feedback(), block, rows_, lines(), columns_.get(), cols_, exact(), codes_.get());
        if (block.end < near) {
          add(sums(), errors(), block, {block.end, near});
        } else {
          add(sums(), errors(), {begun, block.end}, {block.end, cols_});
          begun = block.end;
        }
      }
    }
    unsigned long long bad = ~0ull;
    if (fitted_) first_bad.read(&bad, 1);
    if (bad != ~0ull) refuse(static_cast<int64_t>(bad), groups);
    const int64_t bytes = a_.codes_size / rows_;
    cuda::pack(
        {sizeof(qtr_pack_args), codes_.get(), rows_, cols_, cols_, a_.bits, a_.codes, bytes, all_.device});
    a_.result->loss = loss(groups);
  }

 private:
  static constexpr int kShared = kBlock * kBlock * static_cast<int>(sizeof(float));

  Places sums() const { return {sums_.get(), stride_of(cols_), 0}; }
  Places errors() const { return {errors_.get(), stride_of(cols_), 0}; }
  Feedback feedback() const {
    return a_.factor == nullptr ? Feedback{panels_.get(), 0} : Feedback{a_.factor, cols_};
  }
  const uint8_t* exact() const { return a_.exclude_row_offsets == nullptr ? nullptr : exact_.get(); }
  int64_t group_of(int64_t place) const { return all_.order[place] / group_; }

  Lines lines() const {
    const int64_t groups = rows_ * groups_per_row_;
    if (!fitted_) return {a_.scale, a_.zero, group_, groups_per_row_, a_.bits};
    return {{a_.fitted_scale, 1, groups, groups, QTR_F32},
            {a_.fitted_zero, 1, groups, groups, QTR_F32},
            group_,
            groups_per_row_,
            a_.bits};
  }

  std::vector<Span> groups_in_turn() const {
    std::vector<Span> groups;
    for (int64_t place = 0; place < cols_; ++place) {
      if (place == 0 || group_of(place) != group_of(place - 1)) groups.push_back({place, place});
      groups.back().end = place + 1;
    }
    return groups;
  }

  // The columns of a group from a place on that are taken at once: up to the end of a panel.
  static Span block_of(int64_t begin, Span group) {
    return {begin, std::min(begin / kPanel * kPanel + kBlock, group.end)};
  }

  void add(const Places& to_sums, const Places& of_errors, Span from, Span to) {
    if (to.size() <= 0) return;
    const int64_t base = to.begin / kPanel * kPanel;
    const int64_t tiles = ceil_div(rows_, kSide) * ceil_div(to.end - base, kSide);
    launch(add_feedback, static_cast<unsigned>(tiles), kThreads, 0, stream_, to_sums, of_errors, feedback(),
           rows_, from, to);
  }

  void fit(Span group, int64_t turn, unsigned long long* first_bad) {
    const int64_t first = group.begin / kPanel * kPanel, stride = stride_of(group.size());
    Scratch<float> y_of(rows_ * stride, stream_), moves_of(rows_ * stride, stream_);
    const Places y{y_of.get(), stride, first}, moves{moves_of.get(), stride, first};
    expect(cudaMemcpy2DAsync(y_of.get() + group.begin - first, sizeof(float) * static_cast<size_t>(stride),
                             sums_.get() + group.begin, sizeof(float) * static_cast<size_t>(stride_of(cols_)),
                             sizeof(float) * static_cast<size_t>(group.size()), static_cast<size_t>(rows_),
                             cudaMemcpyDeviceToDevice, stream_),
           "copying sums");
    for (Span block = block_of(group.begin, group); block.size() > 0; block = block_of(block.end, group)) {
      launch(move_columns, blocks_for(ceil_div(rows_, kRows)), kRows * kWarp, kShared, stream_, y, moves,
             errors(), feedback(), block, rows_);
      add(y, moves, block, {block.end, group.end});
    }
    const GridRule rule{a_.bits,
                        a_.fitted_zero == nullptr,
                        false,
                        a_.solver == QTR_MSE,
                        std::numeric_limits<float>::infinity(),
                        false,
                        a_.integer_zero != 0,
                        a_.scale_format};
    launch(fit_rows, grid_of(rows_, kThreads / kLanes), kThreads, 0, stream_, y, group, rows_, rule, exact(),
           columns_.get(), cols_, a_.half != 0, group_of(group.begin), groups_per_row_, turn, a_.fitted_scale,
           a_.fitted_zero, first_bad);
  }

  [[noreturn]] void refuse(int64_t key, const std::vector<Span>& groups) const {
    const int64_t in_turn = key / kGptqStrip, turn = in_turn % groups_per_row_;
    const int64_t row = in_turn / groups_per_row_ * kGptqStrip + key % kGptqStrip;
    throw Refused("[gptq] the range of a group must be finite in float32: got row=" + std::to_string(row) +
                  ", group=" + std::to_string(group_of(groups[static_cast<size_t>(turn)].begin)));
  }

  double loss(const std::vector<Span>& groups) const {
    std::vector<int32_t> starts;
    for (const Span& group : groups)
      for (int64_t k = group.begin; k < group.end; ++k)
        if (k == group.begin || k % kPanel == 0) starts.push_back(static_cast<int32_t>(k));
    const auto spans = static_cast<int64_t>(starts.size());
    starts.push_back(static_cast<int32_t>(cols_));
    const int64_t pieces = ceil_div(rows_, kGptqRows);
    Scratch<int32_t> starts_there(spans + 1, stream_);
    Scratch<double> pivots(cols_, stream_), losses(pieces * spans, stream_);
    starts_there.write(starts.data(), spans + 1);
    pivots.write(all_.pivots, cols_);
    launch(add_losses, grid_of(pieces * spans), kThreads, 0, stream_, sums(), rows_, starts_there.get(),
           spans, pivots.get(), losses.get());
    std::vector<double> parts(static_cast<size_t>(pieces * spans));
    losses.read(parts.data(), pieces * spans);
    double loss = 0;
    for (int64_t piece = 0; piece < pieces; piece += kGptqStrip / kGptqRows) {
      double of_strip = 0;
      for (int64_t span = 0; span < spans; ++span)
        for (int64_t p = piece; p < std::min(piece + kGptqStrip / kGptqRows, pieces); ++p)
          of_strip += parts[static_cast<size_t>(p * spans + span)];
      loss += of_strip;
    }
    return loss;
  }

  const qtr_gptq_columns_args& all_;
  const qtr_gptq_args& a_;
  int64_t rows_, cols_, group_, groups_per_row_;
  bool fitted_;
  cudaStream_t stream_;
  Scratch<float> sums_, errors_, panels_;
  Scratch<int32_t> columns_;
  Scratch<uint8_t> codes_, exact_;
};

}  // namespace

void gptq_columns(const qtr_gptq_columns_args& a) {
  Solver(a).run();
}

}  // namespace quantrature::cuda
