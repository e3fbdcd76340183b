// How a matrix is cut for quantizing. What depends on it: the order in which the HQQ solver adds errors, on
// all backends.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

#include "common/ceil_div.hpp"

namespace quantrature {

inline constexpr int64_t kGridSpan = 4096;  // numbers of a piece, about: they stay in the first-level cache
inline constexpr int64_t kLongestGridPiece =
    1 << 16;                                  // pieces of whole groups and whole blocks, if they are shorter
inline constexpr int64_t kGridColumns = 256;  // of a piece on axis 0: whole blocks of each row

// The matrix as the grid sees it.
struct GridView {
  int64_t rows, cols;
  int64_t group;           // numbers of a group
  int64_t groups_per_row;  // on axis 0 of all rows together
  int axis;

  int64_t groups() const { return axis == 1 ? rows * groups_per_row : groups_per_row; }
};

// The view of arguments that were checked.
inline GridView grid_view(int64_t rows, int64_t cols, int64_t group_size, int axis) {
  if (axis == 1) {
    const int64_t group = group_size == -1 ? cols : std::min(group_size, cols);
    return {rows, cols, group, ceil_div(cols, group), axis};
  }
  const int64_t group = group_size == -1 ? rows : group_size;
  const int64_t columns = rows * cols / group;
  return {group, columns, group, columns, axis};
}

// A view cut into pieces of whole groups. On axis 1 a piece is a part of a row, on axis 0 some columns. What
// is computed of a piece depends on nothing else.
struct GridPieces {
  GridView view;
  int64_t span;     // columns of a piece
  int64_t per_row;  // on axis 0 of all rows together

  explicit GridPieces(const GridView& v) : view(v) {
    if (v.axis == 1) {
      const int64_t aligned = std::lcm(v.group, int64_t{256});
      span = v.group > kLongestGridPiece || aligned > kLongestGridPiece
                 ? v.cols
                 : aligned * ceil_div(kGridSpan, aligned);
      span = std::min(span, v.cols);
    } else {
      span = std::min(kGridColumns, v.cols);
    }
    per_row = ceil_div(v.cols, span);
  }
  int64_t count() const { return view.axis == 1 ? view.rows * per_row : per_row; }
  int64_t longest() const { return view.axis == 1 ? span : span * view.group; }
  int64_t groups_of_longest() const { return view.axis == 1 ? ceil_div(span, view.group) : span; }
};

struct GridPiece {
  int64_t row;         // on axis 1
  int64_t begin, end;  // columns
  int64_t first_group;
  int64_t size;  // numbers

  GridPiece(const GridPieces& p, int64_t index) {
    const GridView& v = p.view;
    row = index / p.per_row;
    begin = index % p.per_row * p.span;
    end = std::min(begin + p.span, v.cols);
    first_group = v.axis == 1 ? row * v.groups_per_row + begin / v.group : begin;
    size = v.axis == 1 ? end - begin : (end - begin) * v.group;
  }
};

}  // namespace quantrature
