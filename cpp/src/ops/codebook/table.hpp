// What every reader of codebooks asks of a table.
#pragma once

#include "common/check.hpp"

namespace quantrature {

inline void check_table(const Matrix& table, int bits, int64_t rows, const char* op) {
  check_for(op, bits >= 1 && bits <= 8, "bits must be 1 to 8", "bits", bits);
  check_matrix(table, op, "table");
  check_for(op, table.cols == 1 << bits, "table must have 2^bits entries", "entries", table.cols, "bits",
            bits);
  check_for(op, table.rows == 1 || table.rows == rows, "table must have one row, or one for each row", "rows",
            table.rows, "expected", rows);
}

}  // namespace quantrature
