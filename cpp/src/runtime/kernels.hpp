// The table of kernels that kernels.inc lists; one exists for each target.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/ordered_key.hpp"
#include "ops/codebook/search.hpp"
#include "ops/gguf/lines.hpp"
#include "ops/gptq/columns.hpp"
#include "ops/grid/line.hpp"
#include "ops/kmeans/sums.hpp"
#include "ops/matvec/block.hpp"
#include "ops/packing/span.hpp"
#include "ops/trellis/tile.hpp"
#include "ops/viterbi/step.hpp"
#include "quantrature/moments.hpp"

namespace quantrature {

struct KernelTable {
#define QUANTRATURE_OP(op)
#define QUANTRATURE_KERNEL(name, ...) std::add_pointer_t<__VA_ARGS__> name = nullptr;
#include "runtime/kernels.inc"
#undef QUANTRATURE_KERNEL
#undef QUANTRATURE_OP
};

}  // namespace quantrature
