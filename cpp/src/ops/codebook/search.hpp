// How the nearest entry of a table is found: by counting the bounds between entries that a number exceeds.
#pragma once

#include <cstdint>

namespace quantrature {

struct CodebookSearch {
  const float* bounds;   // ascending: a number lies nearest to the entry whose rank is how many are below it
  int count;             // of the bounds
  const uint8_t* codes;  // of the entries by rank, count + 1 of them
  bool ranks_are_codes;
};

}  // namespace quantrature
