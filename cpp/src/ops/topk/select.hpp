// Selection under the name of the op that needs it.
#pragma once

#include "quantrature/topk.hpp"

namespace quantrature {

// The argument that a complaint about the numbers names.
struct Asker {
  const char* op;
  const char* name;
};

// topk() for another op, which has checked all but the numbers.
void select_largest(const TopkArgs& args, const Asker& asker);

// The same of one matrix without gaps between its rows, by absolute value; the pass that looks for the
// largest also copies the matrix to remainder, past the cache, with 0 where they are. False where it took
// another way, and remainder has anything.
bool select_and_empty(const TopkArgs& args, const Asker& asker, void* remainder);

}  // namespace quantrature
