// The Highway targets that are compiled in and that this CPU can run.
#pragma once

#include <string>
#include <vector>

#include "runtime/kernels.hpp"

namespace quantrature {

struct Target {
  std::string name;
  KernelTable kernels;
};

// From the slowest to the fastest; each table starts as a copy of reference.
std::vector<Target> simd_targets(const KernelTable& reference);

}  // namespace quantrature
