// Work on the threads of an OpenMP runtime that another library of the process uses, in place of the built-in
// pool: its threads spin for milliseconds after each of that library's products, and a second pool would
// share the processors with them.
#pragma once

#include <string>

namespace quantrature::bindings {

// Takes the OpenMP runtime that a loaded library depends on, for num_threads() threads. False, and the
// built-in pool stays, if the library is not loaded or depends on none. A forked child has the built-in pool.
bool run_on_openmp_of(const std::string& library);

// set_num_threads of the core, for the pool that is in use.
void set_threads(int count);

}  // namespace quantrature::bindings
