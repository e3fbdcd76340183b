#include "common/check.hpp"

namespace quantrature {

Error::Error(const std::string& message) : std::runtime_error(message) {}
Error::~Error() = default;
InvalidArgument::InvalidArgument(const std::string& message) : Error(message) {}
InvalidArgument::~InvalidArgument() = default;
Unsupported::Unsupported(const std::string& message) : Error(message) {}
Unsupported::~Unsupported() = default;
DeviceError::DeviceError(const std::string& message) : Error(message) {}
DeviceError::~DeviceError() = default;

void check_matrix(const Matrix& m, const char* op, const char* name) {
  const auto rule = [&](bool ok, const char* text, auto... names_and_values) {
    if (!ok) [[unlikely]]
      check_for(op, ok, (std::string(name) + ' ' + text).c_str(), names_and_values...);
  };
  rule(m.rows > 0 && m.cols > 0, "must not be empty", "rows", m.rows, "cols", m.cols);
  rule(m.data != nullptr, "must not be null");
  rule(m.rows == 1 || m.row_stride >= m.cols, "has rows that overlap", "row_stride", m.row_stride, "cols",
       m.cols);
  rule(m.dtype == QTR_F32 || m.dtype == QTR_F16 || m.dtype == QTR_BF16,
       "must be float32, float16 or bfloat16", "dtype", static_cast<int>(m.dtype));
}

void check_matrix(const MutableMatrix& m, const char* op, const char* name) {
  check_matrix(Matrix{m.data, m.rows, m.cols, m.row_stride, m.dtype}, op, name);
}

}  // namespace quantrature
