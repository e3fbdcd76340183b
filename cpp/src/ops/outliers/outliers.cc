#include "quantrature/outliers.hpp"

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/check.hpp"
#include "common/float_rows.hpp"
#include "layout/csr.hpp"
#include "ops/topk/select.hpp"
#include "runtime/backend.hpp"
#include "runtime/thread_pool.hpp"

namespace quantrature {
namespace {

constexpr int64_t kTaskElements = 1 << 16;
constexpr int64_t kPieceBytes = 1 << 13;
constexpr int64_t kCacheBytes = 1 << 25;  // what the last level of a cache may hold

void put_column(const OutliersArgs& a, int64_t at, int64_t column) {
  if (a.w.cols <= kNarrowCols)
    static_cast<uint16_t*>(a.columns)[at] = static_cast<uint16_t>(column);
  else
    static_cast<int32_t*>(a.columns)[at] = static_cast<int32_t>(column);
}

void put_offset(const OutliersArgs& a, int64_t row, int64_t nnz, int64_t offset) {
  if (wide_offsets(nnz))
    static_cast<int64_t*>(a.row_offsets)[row] = offset;
  else
    static_cast<int32_t*>(a.row_offsets)[row] = static_cast<int32_t>(offset);
}

const char* element(const Matrix& m, int64_t row, int64_t col) {
  return static_cast<const char*>(m.data) + (row * m.row_stride + col) * element_size(m.dtype);
}

char* element(const MutableMatrix& m, int64_t row, int64_t col) {
  return static_cast<char*>(m.data) + (row * m.row_stride + col) * element_size(m.dtype);
}

// The cache cannot hold the remainder anyway.
bool passes_cache(const OutliersArgs& a) {
  return a.remainder.data != a.w.data && a.w.rows * a.w.cols * element_size(a.w.dtype) > kCacheBytes;
}

bool without_gaps(const OutliersArgs& a) {
  return a.w.row_stride == a.w.cols && a.remainder.row_stride == a.w.cols;
}

// Columns begin to end of one row: copied, then emptied where an outlier is, before they pass the cache, if
// they do. Unless that has been done, and only columns and offsets are to be written.
void split_run(const OutliersArgs& a, const int64_t* indices, int64_t nnz, bool emptied, int64_t row,
               int64_t begin, int64_t end) {
  const int64_t size = element_size(a.w.dtype);
  const bool past_cache = !emptied && passes_cache(a);
  const int64_t base = row * a.w.cols;
  int64_t at = std::lower_bound(indices, indices + nnz, base + begin) - indices;
  if (begin == 0) put_offset(a, row, nnz, at);
  alignas(64) char piece[kPieceBytes];
  const int64_t step = emptied ? end - begin : kPieceBytes / size;
  for (int64_t first = begin; first < end; first += step) {
    const int64_t last = std::min(first + step, end);
    const size_t bytes = static_cast<size_t>((last - first) * size);
    char* target = past_cache ? piece : element(a.remainder, row, first);
    if (!emptied && a.remainder.data != a.w.data) std::memcpy(target, element(a.w, row, first), bytes);
    for (; at < nnz && indices[at] < base + last; ++at) {
      const int64_t column = indices[at] - base;
      put_column(a, at, column);
      if (!emptied) std::memset(target + (column - first) * size, 0, static_cast<size_t>(size));
    }
    if (past_cache)
      kernels().copy_past_cache(piece, element(a.remainder, row, first), (last - first) * size,
                                element(a.w, row, last));
  }
}

void split(const OutliersArgs& a, const int64_t* indices, int64_t nnz, bool emptied) {
  put_offset(a, a.w.rows, nnz, nnz);
  const int64_t runs = (a.w.cols + kTaskElements - 1) / kTaskElements;
  const int64_t runs_of_task = std::max<int64_t>(1, kTaskElements / a.w.cols);
  parallel_for_pieces(a.w.rows * runs, runs_of_task, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i % runs * kTaskElements;
      split_run(a, indices, nnz, emptied, i / runs, begin, std::min(begin + kTaskElements, a.w.cols));
    }
  });
}

void check_chosen(const OutliersArgs& a, int64_t elements) {
  for (int64_t i = 0; i < a.count; ++i) {
    check(a.indices[i] >= 0 && a.indices[i] < elements, "[extract_outliers] indices must be within w",
          "index", a.indices[i], "position", i, "elements", elements);
    check(i == 0 || a.indices[i - 1] < a.indices[i],
          "[extract_outliers] indices must ascend, each given once", "index", a.indices[i], "position", i);
  }
}

void copy_chosen(const OutliersArgs& a) {
  const size_t size = static_cast<size_t>(element_size(a.w.dtype));
  for (int64_t i = 0; i < a.count; ++i)
    std::memcpy(static_cast<char*>(a.values) + static_cast<size_t>(i) * size,
                element(a.w, a.indices[i] / a.w.cols, a.indices[i] % a.w.cols), size);
}

}  // namespace

void extract_outliers(const OutliersArgs& a) {
  check_matrix(a.w, "extract_outliers", "w");
  check_matrix(a.remainder, "extract_outliers", "remainder");
  check(a.remainder.rows == a.w.rows && a.remainder.cols == a.w.cols && a.remainder.dtype == a.w.dtype,
        "[extract_outliers] remainder must have the shape and dtype of w", "rows", a.remainder.rows, "cols",
        a.remainder.cols, "dtype", static_cast<int>(a.remainder.dtype));
  check(a.remainder.data != a.w.data || a.remainder.row_stride == a.w.row_stride,
        "[extract_outliers] remainder must be w or apart from it", "row_stride", a.remainder.row_stride);
  check(a.w.cols <= INT32_MAX, "[extract_outliers] w must have fewer than 2^31 columns", "cols", a.w.cols);
  const int64_t elements = a.w.rows * a.w.cols;
  check(a.count >= 0, "[extract_outliers] count must be at least 0", "count", a.count);
  if (a.per_row)
    check(a.count <= a.w.cols, "[extract_outliers] count must not exceed the length of a row", "count",
          a.count, "cols", a.w.cols);
  else
    check(a.count <= elements, "[extract_outliers] count must not exceed the number of elements", "count",
          a.count, "elements", elements);
  check_given(a.count == 0 || a.values != nullptr, "extract_outliers", "values");
  check_given(a.count == 0 || a.columns != nullptr, "extract_outliers", "columns");
  check_given(a.row_offsets != nullptr, "extract_outliers", "row_offsets");
  check(a.indices == nullptr || !a.per_row, "[extract_outliers] indices are of the whole matrix", "per_row",
        a.per_row);
  if (done_on_device(a, "extract_outliers", &qtr_backend::outliers)) return;
  if (a.indices != nullptr) {
    check_chosen(a, elements);
    copy_chosen(a);
    return split(a, a.indices, a.count, false);
  }
  std::vector<int64_t> indices(static_cast<size_t>(a.per_row ? a.w.rows * a.count : a.count));
  const TopkArgs largest{sizeof(TopkArgs), &a.w,           1,        a.count, QTR_KEY_ABS,
                         a.per_row,        indices.data(), a.values, nullptr};
  const Asker asker{"extract_outliers", "w"};
  bool emptied = false;
  if (a.count > 0 && !a.per_row && passes_cache(a) && without_gaps(a))
    emptied = select_and_empty(largest, asker, a.remainder.data);
  else
    select_largest(largest, asker);
  split(a, indices.data(), static_cast<int64_t>(indices.size()), emptied);
}

void check_csr(const Csr& m) {
  check(m.rows > 0 && m.cols > 0, "[csr] shape must not be empty", "rows", m.rows, "cols", m.cols);
  check_extent(m.rows, m.cols, "csr", "shape");
  check(m.nnz >= 0, "[csr] nnz must be at least 0", "nnz", m.nnz);
  check_given(m.nnz == 0 || m.values != nullptr, "csr", "values");
  check_given(m.nnz == 0 || m.columns != nullptr, "csr", "columns");
  check_given(m.row_offsets != nullptr, "csr", "row_offsets");
  check(offset_of(m, 0) == 0, "[csr] row_offsets must begin with 0", "row_offsets[0]", offset_of(m, 0));
  check(offset_of(m, m.rows) == m.nnz, "[csr] row_offsets must end with the number of values", "last",
        offset_of(m, m.rows), "values", m.nnz);
  for (int64_t row = 0; row < m.rows; ++row) {
    const auto [fault, at] = check_row(m, row);
    if (fault == RowFault::none) continue;
    check(fault != RowFault::offsets, "[csr] row_offsets must not fall", "row", row, "from",
          offset_of(m, row), "to", offset_of(m, row + 1));
    check(fault != RowFault::outside, "[csr] columns must be within the shape", "row", row, "column",
          column_of(m, at), "cols", m.cols);
    check(fault != RowFault::order, "[csr] columns of a row must ascend", "row", row, "column",
          column_of(m, at));
  }
}

}  // namespace quantrature
