// Runs a fixed list of tasks on all threads. What a task computes must depend on its index alone, never on
// the thread.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <type_traits>

namespace quantrature {

using Task = void (*)(void* context, int64_t index);

// Calls task(context, i) once for each i in [0, count) and returns when all have returned. Tasks must not
// throw. A call from inside a task, or while another thread's call runs, does its tasks on the calling
// thread.
void run_tasks(int64_t count, Task task, void* context);

// The same for a callable, which may throw where memory is short: the caller is then thrown one of what was
// thrown, when all tasks have ended.
template <class Body>
void parallel_for(int64_t count, Body&& body) {
  if (count == 1) return static_cast<void>(body(int64_t{0}));
  struct Context {
    std::remove_reference_t<Body>& body;
    std::atomic_flag failed{};
    std::exception_ptr thrown{};
  } all{body};
  run_tasks(
      count,
      [](void* context, int64_t index) {
        Context& c = *static_cast<Context*>(context);
        try {
          c.body(index);
        } catch (...) {
          if (!c.failed.test_and_set()) c.thrown = std::current_exception();
        }
      },
      &all);
  if (all.thrown) std::rethrow_exception(all.thrown);
}

// Cuts [0, n) into pieces of `piece` elements, the last one shorter, and calls body(begin, end) for each.
template <class Body>
void parallel_for_pieces(int64_t n, int64_t piece, Body&& body) {
  parallel_for((n + piece - 1) / piece, [&](int64_t i) {
    const int64_t begin = i * piece;
    body(begin, begin + piece < n ? begin + piece : n);
  });
}

}  // namespace quantrature
