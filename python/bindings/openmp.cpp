#include "bindings/openmp.hpp"

#ifdef __linux__
#include <dlfcn.h>
#include <pthread.h>
#endif

#include <atomic>
#include <memory>

#include "quantrature/quantrature.hpp"

namespace quantrature::bindings {

#ifdef __linux__
namespace {

// The interface that GCC compiles to, which libgomp, LLVM's and Intel's runtime offer alike.
using Parallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
using ThreadNumber = int (*)();

Parallel parallel = nullptr;
ThreadNumber thread_number = nullptr;

struct alignas(64) Share {
  std::atomic<int64_t> next{0};
  int64_t end = 0;
};

struct Job {
  void (*task)(void*, int64_t);
  void* context;
  int threads;
  std::unique_ptr<Share[]> shares;
};

// Begins with tasks that follow one another, and then helps with the others' (thread_pool.cc says why). There
// may be fewer threads than shares, as inside another parallel region.
void drain(void* data) {
  Job& job = *static_cast<Job*>(data);
  for (int k = 0; k < job.threads; ++k) {
    Share& share = job.shares[static_cast<size_t>((thread_number() + k) % job.threads)];
    for (int64_t i; (i = share.next++) < share.end;) job.task(job.context, i);
  }
}

void install(int threads) {
  Executor executor{};
  executor.struct_size = sizeof(executor);
  executor.concurrency = threads;
  executor.run = [](void*, int64_t count, void (*task)(void*, int64_t), void* context) {
    Job job{task, context, num_threads(), nullptr};
    job.shares = std::make_unique<Share[]>(static_cast<size_t>(job.threads));
    for (int i = 0; i < job.threads; ++i) {
      job.shares[static_cast<size_t>(i)].next = count * i / job.threads;
      job.shares[static_cast<size_t>(i)].end = count * (i + 1) / job.threads;
    }
    parallel(drain, &job, static_cast<unsigned>(job.threads), 0);
  };
  set_executor(threads == 1 ? nullptr : &executor);
}

}  // namespace

bool run_on_openmp_of(const std::string& library) {
  void* handle = dlopen(library.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  if (handle == nullptr) return false;
  // Looks into what the library depends on, too. The handle is kept: so is the runtime.
  const auto threads = reinterpret_cast<Parallel>(dlsym(handle, "GOMP_parallel"));
  const auto number = reinterpret_cast<ThreadNumber>(dlsym(handle, "omp_get_thread_num"));
  if (threads == nullptr || number == nullptr) return false;
  const int count = num_threads();  // before pthread_atfork: the core has its own handlers, which come first
  if (parallel == nullptr)
    pthread_atfork(nullptr, nullptr, [] {
      parallel = nullptr;
      set_executor(nullptr);
    });
  parallel = threads, thread_number = number;
  install(count);
  return true;
}

void set_threads(int count) {
  set_num_threads(count);
  if (parallel != nullptr) install(count);
}

#else

bool run_on_openmp_of(const std::string&) {
  return false;
}

void set_threads(int count) {
  set_num_threads(count);
}

#endif

}  // namespace quantrature::bindings
