// fill_<op>() puts the reference kernels of an op into a table: the definition that every target is compared
// with.
#pragma once

#include "runtime/kernels.hpp"

namespace quantrature::reference {

#define QUANTRATURE_OP(op) void fill_##op(KernelTable& table);
#define QUANTRATURE_KERNEL(name, ...)
#include "runtime/kernels.inc"
#undef QUANTRATURE_KERNEL
#undef QUANTRATURE_OP

}  // namespace quantrature::reference
