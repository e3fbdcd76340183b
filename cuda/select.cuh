// Selection under the name of the op that needs it.
#pragma once

#include "quantrature/c_api.h"

namespace quantrature::cuda {

// topk() for another op.
void select_largest(const qtr_topk_args& args, const char* op, const char* name);

}  // namespace quantrature::cuda
