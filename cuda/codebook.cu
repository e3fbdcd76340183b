// Codes of entries of tables. Tables are sorted and bounded once each; numbers then find their entry by
// halving. Numeric class E.
#include "backend.cuh"
#include "device/elements.cuh"
#include "exclude.cuh"
#include "finite.cuh"
#include "launch.cuh"
#include "ops/codebook/search.hpp"
#include "tile.cuh"

namespace quantrature::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMostEntries = 256;
constexpr int kLanes = 16;
constexpr int kGroups = kThreads / kLanes;  // of a block at a time
constexpr float kSmallest = 0x1p-100f;

// Entries by rank and the bounds between them; only the first of equal entries has a rank.
struct Tables {
  float* bounds;  // kMostEntries of each table
  uint8_t* codes;
  int* entries;
  bool per_row;
};

struct Groups {
  int64_t size, per_row;
};

Groups groups_of(int64_t cols, int64_t group_size) {
  if (group_size == 0) return {cols, 0};
  const int64_t size = group_size == -1 ? cols : std::min(group_size, cols);
  return {size, ceil_div(cols, size)};
}

// A block for each table. first_bad: the least table that is not finite.
__global__ void __launch_bounds__(kThreads)
    sort_tables(qtr_matrix table, Tables to, unsigned long long* first_bad) {
  __shared__ float entries[kMostEntries], sorted[kMostEntries];
  __shared__ bool distinct[kMostEntries];
  const int i = static_cast<int>(threadIdx.x), n = static_cast<int>(table.cols);
  for (int64_t row = blockIdx.x; row < table.rows; row += gridDim.x) {
    if (i < n) {
      entries[i] = load(table.data, table.dtype, row * table.row_stride + i);
      if (!is_finite(entries[i])) atomicMin(first_bad, static_cast<unsigned long long>(row * n + i));
    }
    __syncthreads();
    if (i < n) {
      distinct[i] = true;
      for (int j = 0; j < i; ++j)
        if (entries[j] == entries[i]) distinct[i] = false;
    }
    __syncthreads();
    if (i < n && distinct[i]) {
      int rank = 0;
      for (int j = 0; j < n; ++j) rank += distinct[j] && entries[j] < entries[i];
      sorted[rank] = entries[i];
      to.codes[row * kMostEntries + rank] = static_cast<uint8_t>(i);
    }
    if (i == 0) {
      int count = 0;
      for (int j = 0; j < n; ++j) count += distinct[j];
      to.entries[row] = count;
    }
    __syncthreads();
    int count = 0;
    for (int j = 0; j < n; ++j) count += distinct[j];
    if (i + 1 < count) to.bounds[row * kMostEntries + i] = bound_between(sorted[i], sorted[i + 1]);
    __syncthreads();
  }
}

// Half a warp for each group; excluded: 1 in the places that take no part, or null.
__global__ void __launch_bounds__(kThreads)
    largest_of_groups(qtr_matrix w, Groups of, const uint8_t* excluded, float* scale, float* inv,
                      unsigned long long* first_bad) {
  const int64_t per_row = of.per_row == 0 ? 1 : of.per_row, groups = w.rows * per_row;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kGroups; first < groups;
       first += static_cast<int64_t>(gridDim.x) * kGroups) {
    const int64_t own = first + threadIdx.x / kLanes;
    const int64_t g = own < groups ? own : groups - 1;
    const int64_t row = g / per_row, begin = g % per_row * of.size;
    const int64_t end = begin + of.size < w.cols ? begin + of.size : w.cols;
    float largest = 0;
    for (int64_t j = begin + lane; j < end; j += kLanes) {
      const float x = load(w.data, w.dtype, row * w.row_stride + j);
      if (!is_finite(x)) atomicMin(first_bad, static_cast<unsigned long long>(row));
      if (excluded != nullptr && excluded[row * w.cols + j] != 0) continue;
      const float size = std::abs(x);
      largest = size > largest ? size : largest;
    }
    for (int apart = kLanes / 2; apart > 0; apart /= 2) {
      const float other = __shfl_xor_sync(0xffffffffu, largest, apart, kLanes);
      largest = other > largest ? other : largest;
    }
    if (lane != 0 || own >= groups || of.per_row == 0) continue;
    scale[g] = largest < kSmallest ? 0.0f : largest;
    inv[g] = scale[g] == 0 ? 0.0f : 1 / scale[g];
  }
}

// A block for each tile of a row.
__global__ void __launch_bounds__(kThreads)
    encode_entries(qtr_matrix w, Groups of, const float* inv, Tables tables, int bits, int64_t tiles,
                   bool whole, uint8_t* packed) {
  __shared__ uint8_t codes[kTile], of_rank[kMostEntries];
  __shared__ float bounds[kMostEntries];
  const int64_t row_bytes = packed_row_bytes(bits, w.cols);
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t i = blockIdx.x; i < w.rows * tiles; i += gridDim.x) {
    const int64_t row = i / tiles, begin = i % tiles * kTile, table = tables.per_row ? row : 0;
    const int64_t end = begin + kTile < w.cols ? begin + kTile : w.cols;
    const int entries = tables.entries[table];
    if (thread < entries) of_rank[thread] = tables.codes[table * kMostEntries + thread];
    if (thread + 1 < entries) bounds[thread] = tables.bounds[table * kMostEntries + thread];
    __syncthreads();
    for (int64_t j = begin + thread; j < end; j += kThreads) {
      const float x = load(w.data, w.dtype, row * w.row_stride + j);
      const float at = of.per_row == 0 ? x : x * inv[row * of.per_row + j / of.size];
      int low = 0, high = entries - 1;  // the rank is how many bounds are below
      while (low < high) {
        const int middle = (low + high) / 2;
        if (bounds[middle] < at)
          low = middle + 1;
        else
          high = middle;
      }
      codes[j - begin] = of_rank[low];
    }
    __syncthreads();
    uint8_t* out = packed + row * row_bytes;
    if (whole)
      pack_whole_tile(codes, begin, end, w.cols, bits, thread, kThreads,
                      [&](int64_t at, uint32_t word) { reinterpret_cast<uint32_t*>(out)[at] = word; });
    else
      pack_tile(codes, begin, end, w.cols, bits, thread, kThreads,
                [&](int64_t at, uint8_t byte) { out[at] = byte; });
    __syncthreads();
  }
}

// Four neighbours a thread.
__global__ void __launch_bounds__(kThreads)
    decode_entries(const uint8_t* packed, int bits, Groups of, qtr_matrix table, qtr_matrix scale,
                   qtr_mutable_matrix out, bool by_four) {
  const int64_t fours = (out.cols + 3) / 4, step = static_cast<int64_t>(gridDim.x) * kThreads;
  const int64_t row_bytes = packed_row_bytes(bits, out.cols);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < out.rows * fours;
       i += step) {
    const int64_t row = i / fours, begin = i % fours * 4;
    Four values{};
    for (int k = 0; k < 4; ++k) {
      const int64_t j = begin + k;
      if (j >= out.cols) continue;
      const int code = code_at(packed + row * row_bytes, bits, out.cols, j);
      values.v[k] = load(table.data, table.dtype, (table.rows > 1 ? row * table.row_stride : 0) + code);
      if (of.per_row != 0) values.v[k] *= load(scale.data, scale.dtype, row * of.per_row + j / of.size);
    }
    const int64_t to = row * out.row_stride + begin;
    if (by_four) {
      store4(out.data, out.dtype, to / 4, values);
    } else {
      for (int k = 0; k < 4; ++k)
        if (begin + k < out.cols) store(out.data, out.dtype, to + k, values.v[k]);
    }
  }
}

void check_entries(const qtr_matrix& table, unsigned long long bad, cudaStream_t stream) {
  if (bad == ~0ull) return;
  const int64_t row = static_cast<int64_t>(bad) / table.cols, entry = static_cast<int64_t>(bad) % table.cols;
  throw Refused("[codebook] table must be finite: got value=" + number_at(table, row, entry, stream) +
                ", row=" + std::to_string(row) + ", entry=" + std::to_string(entry));
}

}  // namespace

void codebook_quantize(const qtr_codebook_quantize_args& a) {
  const cudaStream_t stream = stream_of(a.device);
  const Groups groups = groups_of(a.w.cols, a.group_size);
  Scratch<float> bounds(a.table.rows * kMostEntries, stream), inv(a.groups, stream);
  Scratch<uint8_t> codes(a.table.rows * kMostEntries, stream);
  Scratch<int> entries(a.table.rows, stream);
  Scratch<unsigned long long> bad(2, stream);  // an entry, a row of w
  bad.fill_bytes(0xFF, 2);
  const Tables tables{bounds.get(), codes.get(), entries.get(), a.table.rows > 1};
  launch(sort_tables, blocks_for(a.table.rows), kThreads, 0, stream, a.table, tables, bad.get());

  const bool excludes = a.exclude_row_offsets != nullptr;
  Scratch<uint8_t> mask(excludes ? a.w.rows * a.w.cols : 0, stream);
  if (excludes)
    mark_excluded({a.exclude_row_offsets, a.exclude_columns, a.w.rows, a.w.cols}, "codebook", mask, stream);
  const int64_t fitted = a.w.rows * std::max<int64_t>(groups.per_row, 1);
  launch(largest_of_groups, blocks_for(ceil_div(fitted, kGroups)), kThreads, 0, stream, a.w, groups,
         excludes ? static_cast<const uint8_t*>(mask.get()) : nullptr, a.scale, inv.get(), bad.get() + 1);
  const int64_t tiles = ceil_div(a.w.cols, kTile);
  launch(encode_entries, blocks_for(a.w.rows * tiles), kThreads, 0, stream, a.w, groups,
         static_cast<const float*>(inv.get()), tables, a.bits, tiles, whole_tiles(a.codes, a.w.cols),
         a.codes);
  unsigned long long found[2];
  bad.read(found, 2);
  check_entries(a.table, found[0], stream);
  if (found[1] != ~0ull) refuse_not_finite(a.w, "codebook", "w", stream);
}

void codebook_dequantize(const qtr_codebook_dequantize_args& a) {
  const bool by_four =
      a.out.cols % 4 == 0 && a.out.row_stride % 4 == 0 &&
      reinterpret_cast<uintptr_t>(a.out.data) % static_cast<uintptr_t>(4 * bytes_of(a.out.dtype)) == 0;
  launch(decode_entries, blocks_for(ceil_div(a.out.rows * ceil_div(a.out.cols, 4), kThreads)), kThreads, 0,
         stream_of(a.device), a.codes, a.bits, groups_of(a.out.cols, a.group_size), a.table, a.scale, a.out,
         by_four);
}

}  // namespace quantrature::cuda
