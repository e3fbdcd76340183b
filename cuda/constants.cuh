// From a value that is known when an op is called to one that is known when a kernel is compiled.
#pragma once

#include <type_traits>

#include "quantrature/c_api.h"

namespace quantrature::cuda {

// Calls body with the one of some constants that a value is; the last stands for all other values.
template <auto kFirst, auto... kRest, class Value, class Body>
void with_constant(Value value, Body&& body) {
  if constexpr (sizeof...(kRest) == 0) {
    body(std::integral_constant<decltype(kFirst), kFirst>{});
  } else {
    if (value == kFirst)
      body(std::integral_constant<decltype(kFirst), kFirst>{});
    else
      with_constant<kRest...>(value, body);
  }
}

template <class Body>
void with_bits(int bits, Body&& body) {
  with_constant<1, 2, 3, 4, 5, 6, 7, 8>(bits, body);
}

template <class Body>
void with_dtype(qtr_dtype dtype, Body&& body) {
  with_constant<QTR_F32, QTR_F16, QTR_BF16>(dtype, body);
}

}  // namespace quantrature::cuda
