// From a number of bits or a dtype that is known when an op is called to one that is known when a kernel is
// compiled.
#pragma once

#include <type_traits>

#include "quantrature/c_api.h"

namespace quantrature::cuda {

template <class Body>
void with_bits(int bits, Body&& body) {
  switch (bits) {
    case 1:
      return body(std::integral_constant<int, 1>{});
    case 2:
      return body(std::integral_constant<int, 2>{});
    case 3:
      return body(std::integral_constant<int, 3>{});
    case 4:
      return body(std::integral_constant<int, 4>{});
    case 5:
      return body(std::integral_constant<int, 5>{});
    case 6:
      return body(std::integral_constant<int, 6>{});
    case 7:
      return body(std::integral_constant<int, 7>{});
    default:
      return body(std::integral_constant<int, 8>{});
  }
}

template <class Body>
void with_dtype(qtr_dtype dtype, Body&& body) {
  switch (dtype) {
    case QTR_F32:
      return body(std::integral_constant<qtr_dtype, QTR_F32>{});
    case QTR_F16:
      return body(std::integral_constant<qtr_dtype, QTR_F16>{});
    default:
      return body(std::integral_constant<qtr_dtype, QTR_BF16>{});
  }
}

}  // namespace quantrature::cuda
