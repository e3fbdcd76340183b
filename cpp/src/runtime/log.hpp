// Messages for the embedding program, through the hook that it has set (runtime.hpp).
#pragma once

#include "quantrature/c_api.h"

namespace quantrature {

// Whether anybody listens; worth asking before a message is put together.
bool logs(qtr_log_level level) noexcept;

void log(qtr_log_level level, const char* message) noexcept;

}  // namespace quantrature
