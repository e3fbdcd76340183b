#include "common/check.hpp"

#include <algorithm>

namespace quantrature {

Error::Error(const std::string& message) : std::runtime_error(message) {}
Error::~Error() = default;
InvalidArgument::InvalidArgument(const std::string& message) : Error(message) {}
InvalidArgument::~InvalidArgument() = default;
Unsupported::Unsupported(const std::string& message) : Error(message) {}
Unsupported::~Unsupported() = default;
DeviceError::DeviceError(const std::string& message) : Error(message) {}
DeviceError::~DeviceError() = default;

void check_given(bool given, const char* op, const char* name) {
  if (!given) [[unlikely]]
    check_for(op, false, (std::string(name) + " must not be null").c_str(), name, "null");
}

void check_excluded(const char* op, const Matrix& w, const int64_t* offsets, const int32_t* columns) {
  if (offsets == nullptr) return;
  check_given(columns != nullptr, op, "exclude_columns");
  check_for(op, offsets[0] == 0, "exclude must have row_offsets from 0", "row_offset", offsets[0]);
  for (int64_t row = 0; row < w.rows; ++row) {
    check_for(op, offsets[row] <= offsets[row + 1], "exclude must have row_offsets that ascend", "row", row);
    for (int64_t i = offsets[row]; i < offsets[row + 1]; ++i)
      check_for(op, columns[i] >= 0 && columns[i] < w.cols, "exclude must lie within w", "row", row, "col",
                columns[i]);
  }
}

void check_extent(int64_t rows, int64_t row_stride, const char* op, const char* name) {
  if (rows <= kMostElements / std::max<int64_t>(1, row_stride)) return;
  check_for(op, false, (std::string(name) + " is larger than memory can be").c_str(), "rows", rows,
            "row_stride", row_stride);
}

void check_matrix(const Matrix& m, const char* op, const char* name) {
  const auto rule = [&](bool ok, const char* text, auto... names_and_values) {
    if (!ok) [[unlikely]]
      check_for(op, false, (std::string(name) + ' ' + text).c_str(), names_and_values...);
  };
  rule(m.rows > 0 && m.cols > 0, "must not be empty", "rows", m.rows, "cols", m.cols);
  check_given(m.data != nullptr, op, name);
  rule(m.rows == 1 || m.row_stride >= m.cols, "has rows that overlap", "row_stride", m.row_stride, "cols",
       m.cols);
  check_extent(m.rows, m.rows == 1 ? m.cols : m.row_stride, op, name);
  rule(m.dtype == QTR_F32 || m.dtype == QTR_F16 || m.dtype == QTR_BF16,
       "must be float32, float16 or bfloat16", "dtype", static_cast<int>(m.dtype));
}

void check_matrix(const MutableMatrix& m, const char* op, const char* name) {
  check_matrix(Matrix{m.data, m.rows, m.cols, m.row_stride, m.dtype}, op, name);
}

}  // namespace quantrature
