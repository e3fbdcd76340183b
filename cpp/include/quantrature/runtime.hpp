/// \defgroup runtime Kernel sets and threads
///
/// Which kernels run, and on how many threads. Neither changes any result: see the numeric class in each op's
/// header.
#pragma once

#include <string>
#include <vector>

#include "quantrature/types.hpp"

namespace quantrature {

/// \addtogroup runtime
/// \{

/// Names of the kernel sets this CPU can run: "reference" first, then from the slowest to the fastest.
QTR_API std::vector<std::string> available_targets();

/// The kernel set in use: the fastest, unless QUANTRATURE_TARGET or set_target() chose another.
QTR_API std::string target();

/// Chooses the kernel set. Throws InvalidArgument for a name that is not in available_targets().
QTR_API void set_target(const std::string& name);

/// Threads that ops use: QUANTRATURE_NUM_THREADS, else OMP_NUM_THREADS, else the processors this process may
/// run on.
QTR_API int num_threads();

/// Sets the number of threads that ops use. Throws InvalidArgument below 1.
QTR_API void set_num_threads(int count);

/// qtr_executor under its C++ name.
using Executor = qtr_executor;

/// Lets the embedding program run the work; nullptr brings the built-in pool back.
QTR_API void set_executor(const Executor* executor);

/// qtr_log_hook under its C++ name.
using LogHook = qtr_log_hook;

/// Lets the embedding program hear what the library has to say; nullptr: nobody does. Throws InvalidArgument
/// for a hook without write, or a level that is none.
QTR_API void set_log_hook(const LogHook* hook);

/// The version of the library, "MAJOR.MINOR.PATCH".
QTR_API const char* version();

/// \}

}  // namespace quantrature
