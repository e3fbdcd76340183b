// The way from an op to the backend of its device.
#pragma once

#include "quantrature/types.hpp"
#include "runtime/backend_table.h"

namespace quantrature {

// The backend for the device of a call. Throws Unsupported where there is none.
const qtr_backend& backend_of(const qtr_device& device, const char* op);

// Throws what a failure of the backend stands for.
void raise(qtr_status status, const qtr_failure& failure);

// Whether the call is for a device; then it has been carried out there.
template <class Args>
bool done_on_device(const Args& args, const char* op,
                    qtr_status (*qtr_backend::*function)(const Args*, qtr_failure*)) {
  if (args.device.kind == QTR_CPU) [[likely]]
    return false;
  qtr_failure failure{};
  raise((backend_of(args.device, op).*function)(&args, &failure), failure);
  return true;
}

}  // namespace quantrature
