// Excluded positions of the ops that take some.
#pragma once

#include <optional>
#include <string>

#include "bindings/arrays.hpp"

namespace quantrature::bindings {

using Offsets = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig>;
using Columns = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig>;

// Puts the positions into args, whose w and device are set. The core trusts their sizes, which it cannot see;
// on a device _grid.py has checked that the last offset is the number of columns.
template <class Args>
void exclude(const std::optional<Offsets>& row_offsets, const std::optional<Columns>& columns, const char* op,
             Args& args) {
  if (!row_offsets || !columns) return;
  const auto rows = static_cast<size_t>(args.w.rows);
  const auto set = [&] {
    args.exclude_row_offsets = row_offsets->data();
    args.exclude_columns = columns->data();
  };
  const auto refuse = [&](const char* rule) { throw InvalidArgument(std::string("[") + op + "] " + rule); };
  if (row_offsets->shape(0) != rows + 1) refuse("exclude must have one row_offset more than w has rows");
  if (args.device.kind != QTR_CPU) return set();
  static_cast<void>(device_of(std::nullopt, *row_offsets, *columns));
  if (row_offsets->data()[rows] != static_cast<int64_t>(columns->shape(0)))
    refuse("exclude must have as many columns as its last row_offset says");
  set();
}

}  // namespace quantrature::bindings
