// The launchers, one an op; each takes what the core has checked and throws what plugin.cu turns into a
// status.
#pragma once

#include "runtime/backend_table.h"

namespace quantrature::cuda {

#define QTR_BACKEND_OP(name) void name(const qtr_##name##_args& args);
QTR_BACKEND_OPS(QTR_BACKEND_OP)
#undef QTR_BACKEND_OP

}  // namespace quantrature::cuda
