// The one way to refuse an argument: check(condition, "[op] rule", "name", value, ...).
#pragma once

#include <cstdint>
#include <sstream>
#include <string>

#include "quantrature/error.hpp"
#include "quantrature/types.hpp"

namespace quantrature {

template <class... NamesAndValues>
std::string complaint(const char* rule, const NamesAndValues&... names_and_values) {
  std::ostringstream text;
  text << rule;
  if constexpr (sizeof...(names_and_values) > 0) {
    text << ": got ";
    int i = 0;
    ((text << (i == 0 ? "" : (i % 2 ? "=" : ", ")) << names_and_values, ++i), ...);
  }
  return text.str();
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

// No array has more elements: products of sizes up to this, and bytes of them, stay within int64_t.
constexpr int64_t kMostElements = int64_t{1} << 56;

// Throws InvalidArgument if rows of row_stride are more than memory can hold.
void check_extent(int64_t rows, int64_t row_stride, const char* op, const char* name);

// Throws InvalidArgument unless m is a non-empty matrix of a known dtype; op and name go into the message.
void check_matrix(const Matrix& m, const char* op, const char* name);
void check_matrix(const MutableMatrix& m, const char* op, const char* name);

}  // namespace quantrature
