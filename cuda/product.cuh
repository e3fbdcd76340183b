// A product of a packed matrix and some vectors, and the parts of it that every kernel has.
#pragma once

#include "device/elements.cuh"
#include "launch.cuh"
#include "layout/csr.hpp"
#include "layout/planes.hpp"
#include "ops/grid/line.hpp"

namespace quantrature::cuda {

__device__ __forceinline__ float add_warp(float x) {
  for (int apart = 16; apart > 0; apart /= 2)
    x += __shfl_down_sync(0xffffffffu, x, static_cast<unsigned>(apart));
  return x;
}

struct Product {
  qtr_grid_matrix w;
  qtr_matrix table;  // data null: a grid
  qtr_csr residuals;
  qtr_matrix x;
  qtr_mutable_matrix y;
  int64_t group, groups;  // of a row
  int64_t whole;          // columns that are read by words
  bool by_four;           // whether vectors may be read four numbers at a time
};

// Group g of all rows.
__device__ __forceinline__ float zero_at(const qtr_grid_matrix& w, int64_t g, int bits) {
  return w.zero.data == nullptr ? symmetric_zero(bits) : load(w.zero.data, w.zero.dtype, g);
}

__device__ __forceinline__ float scale_at(const qtr_grid_matrix& w, int64_t g) {
  return w.scale.data == nullptr ? 1.0f : load(w.scale.data, w.scale.dtype, g);
}

__device__ __forceinline__ float entry_at(const qtr_matrix& table, int64_t row, int code) {
  return load(table.data, table.dtype, (table.rows > 1 ? row * table.row_stride : 0) + code);
}

// What a code stands for.
__device__ __forceinline__ float value_of(const qtr_grid_matrix& w, const qtr_matrix& table, int bits,
                                          int64_t row, int64_t g, int code) {
  if (table.data != nullptr) return entry_at(table, row, code) * scale_at(w, g);
  return (static_cast<float>(code) - zero_at(w, g, bits)) * scale_at(w, g);
}

// What columns past the whole chunks, and outliers, add to a row; the threads of a warp share it.
template <int kVectors>
__device__ void add_rest(const Product& p, int bits, int64_t row, int lane, int64_t first_vector, int vectors,
                         float (&sum)[kVectors]) {
  const uint8_t* codes = p.w.codes + row * packed_row_bytes(bits, p.w.cols);
  const auto add = [&](float value, int64_t j) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
      if (v < vectors)
        sum[v] = __fmaf_rn(value, load(p.x.data, p.x.dtype, (first_vector + v) * p.x.row_stride + j), sum[v]);
  };
  for (int64_t j = p.whole + lane; j < p.w.cols; j += 32) {
    const int64_t g = row * p.groups + j / p.group;
    add(value_of(p.w, p.table, bits, row, g, code_at(codes, bits, p.w.cols, j)), j);
  }
  if (p.residuals.row_offsets == nullptr) return;
  for (int64_t i = offset_of(p.residuals, row) + lane; i < offset_of(p.residuals, row + 1); i += 32)
    add(static_cast<const float*>(p.residuals.values)[i], column_of(p.residuals, i));
}

// Columns whose codes multiply_by_tiles() takes, from the first on; 0 where it takes none.
int64_t columns_of_tiles(const qtr_grid_matrix& w, int64_t group);

// All vectors, by tensor cores.
void multiply_by_tiles(const Product& p, cudaStream_t stream);

}  // namespace quantrature::cuda
