/// \defgroup types Dtypes and matrices
///
/// C++ names of the argument types that the C interface defines.
#pragma once

#include "quantrature/c_api.h"

namespace quantrature {

/// \addtogroup types
/// \{

/// qtr_dtype under its C++ name.
using DType = qtr_dtype;
/// qtr_matrix under its C++ name.
using Matrix = qtr_matrix;
/// qtr_mutable_matrix under its C++ name.
using MutableMatrix = qtr_mutable_matrix;

/// \}

}  // namespace quantrature
