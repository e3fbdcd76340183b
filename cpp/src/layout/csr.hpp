// How rows and columns of a sparse matrix are stored (quantrature/outliers.hpp), for the host and devices.
#pragma once

#include <cstdint>

#include "common/host_device.hpp"
#include "quantrature/c_api.h"

namespace quantrature {

constexpr int64_t kNarrowCols = 65536;  // columns that 16 bits can count

QUANTRATURE_INLINE bool wide_offsets(int64_t nnz) {
  return nnz > INT32_MAX;
}

QUANTRATURE_INLINE int64_t offset_of(const qtr_csr& m, int64_t row) {
  return wide_offsets(m.nnz) ? static_cast<const int64_t*>(m.row_offsets)[row]
                             : static_cast<const int32_t*>(m.row_offsets)[row];
}

QUANTRATURE_INLINE int64_t column_of(const qtr_csr& m, int64_t i) {
  return m.cols <= kNarrowCols ? static_cast<const uint16_t*>(m.columns)[i]
                               : static_cast<const int32_t*>(m.columns)[i];
}

// What is wrong with a row of a sparse matrix.
enum class RowFault { none, offsets, outside, order };

struct CheckedRow {
  RowFault fault;
  int64_t at;  // the value whose column is wrong
};

// The rules of check_csr for one row: offsets rise from 0 to nnz, columns are within the shape and ascend.
QUANTRATURE_INLINE CheckedRow check_row(const qtr_csr& m, int64_t row) {
  const int64_t begin = offset_of(m, row), end = offset_of(m, row + 1);
  const bool first = row > 0 || begin == 0, last = row < m.rows - 1 || end == m.nnz;
  if (begin < 0 || begin > end || end > m.nnz || !first || !last) return {RowFault::offsets, begin};
  for (int64_t i = begin; i < end; ++i) {
    const int64_t column = column_of(m, i);
    if (column < 0 || column >= m.cols) return {RowFault::outside, i};
    if (i > begin && column_of(m, i - 1) >= column) return {RowFault::order, i};
  }
  return {RowFault::none, 0};
}

}  // namespace quantrature
