#pragma once

#include <cstdint>

#include "common/host_device.hpp"

namespace quantrature {

QUANTRATURE_INLINE int64_t ceil_div(int64_t n, int64_t d) {
  return (n + d - 1) / d;
}

}  // namespace quantrature
