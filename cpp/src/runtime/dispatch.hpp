// The kernel table in use.
#pragma once

#include "runtime/kernels.hpp"

namespace quantrature {

const KernelTable& kernels();

}  // namespace quantrature
