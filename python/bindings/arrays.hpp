// Arrays of Python as the views of the core. NumPy has no bfloat16: arrays of uint16 stand for its bits.
#pragma once

#include <cstdint>
#include <optional>
#include <utility>

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>

#include "quantrature/quantrature.hpp"

namespace quantrature::bindings {

namespace nb = nanobind;
using namespace nb::literals;

// ops.py has checked kind, dtype and contiguity; what reaches these types by another way is a TypeError.
using Input = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;
using Output = nb::ndarray<nb::c_contig, nb::device::cpu>;

// Of ops that run on devices, too.
using AnyInput = nb::ndarray<nb::ro, nb::c_contig>;
using AnyOutput = nb::ndarray<nb::c_contig>;

// The CUDA device of a call and its stream, as place() in _arrays.py gives them; none for the CPU.
using Place = std::optional<std::pair<int32_t, uintptr_t>>;

template <class Array>
bool on_cpu(const Array& array) {
  return array.device_type() == nb::device::cpu::value;
}
template <class Array>
bool on_cpu(const std::optional<Array>& array) {
  return !array || on_cpu(*array);
}

// The same for the core. _arrays.py has checked that all arrays are there; that a pointer to memory of a
// device is not read on the CPU is checked once more.
template <class... Arrays>
Device device_of(const Place& place, const Arrays&... arrays) {
  if (place) return {QTR_CUDA, place->first, reinterpret_cast<void*>(place->second)};
  if (!(on_cpu(arrays) && ...)) throw nb::type_error("expected arrays on the CPU, or where they are");
  return {};
}

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
inline Matrix view(const AnyInput& array) {
  return matrix_of<Matrix>(array);
}
inline MutableMatrix view(const AnyOutput& array) {
  return matrix_of<MutableMatrix>(array);
}

}  // namespace quantrature::bindings
