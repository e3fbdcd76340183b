/// \defgroup error Exceptions
///
/// What the core throws. Messages read "[op] rule that was broken: got name=value, ...".
#pragma once

#include <stdexcept>
#include <string>

#include "quantrature/export.h"

namespace quantrature {

/// \addtogroup error
/// \{

/// Base of what the core throws.
class QTR_API Error : public std::runtime_error {
 public:
  /// what() is the message.
  explicit Error(const std::string& message);
  ~Error() override;
};

/// The caller passed something that breaks the contract of the op.
class QTR_API InvalidArgument : public Error {
 public:
  /// what() is the message.
  explicit InvalidArgument(const std::string& message);
  ~InvalidArgument() override;
};

/// The request is well formed, but this build or machine cannot do it.
class QTR_API Unsupported : public Error {
 public:
  /// what() is the message.
  explicit Unsupported(const std::string& message);
  ~Unsupported() override;
};

/// A device or its driver failed.
class QTR_API DeviceError : public Error {
 public:
  /// what() is the message.
  explicit DeviceError(const std::string& message);
  ~DeviceError() override;
};

/// \}

}  // namespace quantrature
