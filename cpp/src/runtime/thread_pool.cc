#include "runtime/thread_pool.hpp"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "common/check.hpp"
#include "quantrature/runtime.hpp"
#include "runtime/log.hpp"

namespace quantrature {
namespace {

int default_thread_count() {
  for (const char* name : {"QUANTRATURE_NUM_THREADS", "OMP_NUM_THREADS"}) {
    const char* text = std::getenv(name);
    if (text == nullptr) continue;
    const int count = std::atoi(text);
    if (count >= 1) return count;
    if (*text != '\0' && logs(QTR_LOG_WARNING))
      log(QTR_LOG_WARNING, complaint("[threads] no number of threads, passed over", name, text).c_str());
  }
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

thread_local bool inside_task = false;

// One job at a time. After a job the workers spin for a moment, because the next mat-vec of a decode step
// comes within microseconds; then they sleep. A worker that wakes late finds no job and is not waited for.
//
// Every thread begins with a share of tasks that follow one another, and then helps with the shares of the
// others: threads that take turns at neighbouring pieces of a matrix read it a third slower.
class Pool {
 public:
  explicit Pool(int threads) : threads_(threads), shares_(static_cast<size_t>(threads)) {
    try {
      for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
    } catch (const std::system_error&) {  // fewer threads give the same results
      log(QTR_LOG_WARNING, "[threads] the system refused to start all threads that were asked for");
    }
    if (logs(QTR_LOG_INFO))
      log(QTR_LOG_INFO, complaint("[threads] the pool started", "threads", workers_.size() + 1).c_str());
  }

  ~Pool() {
    {
      std::lock_guard lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  void run(int64_t count, Task task, void* context) {
    Job job{task, context};
    for (int i = 0; i < threads_; ++i) {
      shares_[static_cast<size_t>(i)].next = count * i / threads_;
      shares_[static_cast<size_t>(i)].end = count * (i + 1) / threads_;
    }
    {
      std::lock_guard lock(mutex_);
      job_ = &job;
      ++generation_;
    }
    wake_.notify_all();
    drain(job, 0);
    while (job.done != count) pause();
    job_ = nullptr;
    while (inside_ != 0) pause();
  }

 private:
  struct Job {
    Task task;
    void* context;
    std::atomic<int64_t> done{0};
  };

  struct alignas(64) Share {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };

  static constexpr int kSpins = 4000;

  void drain(Job& job, int self) {
    inside_task = true;
    for (int k = 0; k < threads_; ++k) {
      Share& share = shares_[static_cast<size_t>((self + k) % threads_)];
      int64_t done = 0;
      for (int64_t i; (i = share.next++) < share.end; ++done) job.task(job.context, i);
      job.done += done;
    }
    inside_task = false;
  }

  void work(int self) {
    uint64_t seen = 0;
    for (;;) {
      for (int i = 0; i < kSpins && generation_ == seen && !stop_; ++i) pause();
      if (generation_ == seen) {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [&] { return stop_ || generation_ != seen; });
      }
      if (stop_) return;
      seen = generation_;
      // run() clears job_ before it looks at inside_, so a job seen here outlives its use here.
      ++inside_;
      if (Job* job = job_) drain(*job, self);
      --inside_;
    }
  }

  const int threads_;
  std::vector<Share> shares_;
  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<Job*> job_{nullptr};
  std::atomic<int> inside_{0};
  std::atomic<bool> stop_{false};
};

struct Runtime {
  std::mutex busy;  // held while a job runs
  std::atomic<int> threads = default_thread_count();
  Pool* pool = nullptr;
  std::atomic<int> executor_threads = 0;  // 0: the built-in pool
  Executor executor{};

  Runtime() {
    // Threads do not survive a fork: the child starts over, and the parent's pool object is left alone.
    pthread_atfork([] { runtime().busy.lock(); }, [] { runtime().busy.unlock(); },
                   [] {
                     runtime().pool = nullptr;
                     runtime().busy.unlock();
                   });
  }

  static Runtime& runtime() {
    static Runtime& instance = *new Runtime;
    static const int joins_at_exit = std::atexit([] {
      std::lock_guard lock(runtime().busy);
      delete runtime().pool;
      runtime().pool = nullptr;
    });
    static_cast<void>(joins_at_exit);
    return instance;
  }
};

}  // namespace

void run_tasks(int64_t count, Task task, void* context) {
  Runtime& runtime = Runtime::runtime();
  std::unique_lock lock(runtime.busy, std::defer_lock);
  if (inside_task || count < 2 || !lock.try_lock() ||
      (runtime.threads == 1 && runtime.executor_threads == 0)) {
    for (int64_t i = 0; i < count; ++i) task(context, i);
    return;
  }
  if (runtime.executor_threads != 0) {
    runtime.executor.run(runtime.executor.context, count, task, context);
    return;
  }
  if (runtime.pool == nullptr) runtime.pool = new Pool(runtime.threads);
  runtime.pool->run(count, task, context);
}

int num_threads() {
  const Runtime& runtime = Runtime::runtime();
  return runtime.executor_threads != 0 ? runtime.executor_threads : runtime.threads;
}

void set_num_threads(int count) {
  check(count >= 1, "[set_num_threads] count must be at least 1", "count", count);
  Runtime& runtime = Runtime::runtime();
  std::lock_guard lock(runtime.busy);
  if (count == runtime.threads) return;
  delete runtime.pool;
  runtime.pool = nullptr;
  runtime.threads = count;
}

void set_executor(const Executor* executor) {
  Runtime& runtime = Runtime::runtime();
  if (executor != nullptr) {
    check_given(executor->run != nullptr, "set_executor", "run");
    check(executor->concurrency >= 1, "[set_executor] concurrency must be at least 1", "concurrency",
          executor->concurrency);
  }
  std::lock_guard lock(runtime.busy);
  if (executor != nullptr) runtime.executor = *executor;
  runtime.executor_threads = executor != nullptr ? executor->concurrency : 0;
}

}  // namespace quantrature
