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

}  // namespace quantrature
