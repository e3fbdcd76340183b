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
  const auto rule = [&](const char* text) {
    std::ostringstream full;
    full << '[' << op << "] " << name << ' ' << text;
    return full.str();
  };
  check(m.rows > 0 && m.cols > 0, rule("must not be empty").c_str(), "rows", m.rows, "cols", m.cols);
  check(m.data != nullptr, rule("must not be null").c_str());
  check(m.rows == 1 || m.row_stride >= m.cols, rule("has rows that overlap").c_str(), "row_stride",
        m.row_stride, "cols", m.cols);
  check(m.dtype == QTR_F32 || m.dtype == QTR_F16 || m.dtype == QTR_BF16,
        rule("must be float32, float16 or bfloat16").c_str(), "dtype", static_cast<int>(m.dtype));
}

void check_matrix(const MutableMatrix& m, const char* op, const char* name) {
  check_matrix(Matrix{m.data, m.rows, m.cols, m.row_stride, m.dtype}, op, name);
}

}  // namespace quantrature
