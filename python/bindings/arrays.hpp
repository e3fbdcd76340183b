// Arrays of Python as the views of the core. NumPy has no bfloat16: arrays of uint16 stand for its bits.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "quantrature/quantrature.hpp"

namespace quantrature::bindings {

namespace nb = nanobind;
using namespace nb::literals;

// ops.py has checked kind, dtype and contiguity; what reaches these types by another way is a TypeError.
using Input = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;
using Output = nb::ndarray<nb::c_contig, nb::device::cpu>;

inline DType dtype_of(nb::dlpack::dtype dtype) {
  const auto is = [&](nb::dlpack::dtype_code code, int bits) {
    return dtype.code == static_cast<uint8_t>(code) && dtype.bits == bits && dtype.lanes == 1;
  };
  if (is(nb::dlpack::dtype_code::Float, 32)) return QTR_F32;
  if (is(nb::dlpack::dtype_code::Float, 16)) return QTR_F16;
  if (is(nb::dlpack::dtype_code::Bfloat, 16) || is(nb::dlpack::dtype_code::UInt, 16)) return QTR_BF16;
  throw nb::type_error("expected an array of float32, float16 or bfloat16");
}

// One- and two-dimensional arrays; a vector is a matrix of one row.
template <class View, class Array>
View matrix_of(const Array& array) {
  if (array.ndim() != 1 && array.ndim() != 2)
    throw nb::type_error("expected an array of one or two dimensions");
  const int64_t rows = array.ndim() == 2 ? static_cast<int64_t>(array.shape(0)) : 1;
  const int64_t cols = static_cast<int64_t>(array.shape(array.ndim() - 1));
  return View{array.data(), rows, cols, cols, dtype_of(array.dtype())};
}

inline Matrix view(const Input& array) {
  return matrix_of<Matrix>(array);
}
inline MutableMatrix view(const Output& array) {
  return matrix_of<MutableMatrix>(array);
}

}  // namespace quantrature::bindings
