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

}  // namespace quantrature
