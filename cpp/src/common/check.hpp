// The one way to refuse an argument: check(condition, "[op] rule", "name", value, ...).
#pragma once

#include <cstdint>
#include <cstdio>
#include <string>
#include <type_traits>

#include "quantrature/error.hpp"
#include "quantrature/types.hpp"

namespace quantrature {

// A name or value as it reads in a message, whatever the locale: no stream has a part in it.
template <class T>
std::string text_of(const T& value) {
  if constexpr (std::is_floating_point_v<T>) {
    char text[32];
    std::snprintf(text, sizeof(text), "%g", static_cast<double>(value));
    return text;
  } else if constexpr (std::is_arithmetic_v<T>) {
    return std::to_string(value);
  } else {
    return value;
  }
}

template <class... NamesAndValues>
std::string complaint(const char* rule, const NamesAndValues&... names_and_values) {
  std::string text = rule;
  if constexpr (sizeof...(names_and_values) > 0) {
    text += ": got ";
    int i = 0;
    ((text += (i == 0 ? "" : (i % 2 ? "=" : ", ")), text += text_of(names_and_values), ++i), ...);
  }
  return text;
}

template <class... NamesAndValues>
void check(bool ok, const char* rule, const NamesAndValues&... names_and_values) {
  if (!ok) [[unlikely]]
    throw InvalidArgument(complaint(rule, names_and_values...));
}

// The same for a rule that several ops have: what it reads like is put together when it is broken.
template <class... NamesAndValues>
void check_for(const char* op, bool ok, const char* rule, const NamesAndValues&... names_and_values) {
  if (!ok) [[unlikely]]
    throw InvalidArgument(complaint(('[' + std::string(op) + "] " + rule).c_str(), names_and_values...));
}

// Throws InvalidArgument where a pointer that op needs was not given.
void check_given(bool given, const char* op, const char* name);

// Throws InvalidArgument for excluded places outside a matrix: of row i, columns[offsets[i]] to
// columns[offsets[i + 1] - 1]. No offsets exclude nothing.
void check_excluded(const char* op, const Matrix& w, const int64_t* offsets, const int32_t* columns);

// No array has more elements: products of sizes up to this, and bytes of them, stay within int64_t.
constexpr int64_t kMostElements = int64_t{1} << 56;

// Throws InvalidArgument if rows of row_stride are more than memory can hold.
void check_extent(int64_t rows, int64_t row_stride, const char* op, const char* name);

// Throws InvalidArgument unless m is a non-empty matrix of a known dtype; op and name go into the message.
void check_matrix(const Matrix& m, const char* op, const char* name);
void check_matrix(const MutableMatrix& m, const char* op, const char* name);

}  // namespace quantrature
