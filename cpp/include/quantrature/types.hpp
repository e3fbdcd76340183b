// C++ names of the argument types that the C interface defines.
#pragma once

#include "quantrature/c_api.h"

namespace quantrature {

using DType = qtr_dtype;
using Matrix = qtr_matrix;
using MutableMatrix = qtr_mutable_matrix;

}  // namespace quantrature
