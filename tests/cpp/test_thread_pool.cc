#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <new>
#include <numeric>
#include <thread>
#include <vector>

#include "quantrature/quantrature.hpp"
#include "runtime/thread_pool.hpp"

namespace quantrature {
namespace {

class ThreadPool : public testing::Test {
 protected:
  void SetUp() override { set_num_threads(4); }
  void TearDown() override { set_num_threads(before_); }
  int before_ = num_threads();
};

int64_t sum_of_tasks(int64_t count) {
  std::atomic<int64_t> sum = 0;
  parallel_for(count, [&](int64_t i) { sum += i + 1; });
  return sum;
}

TEST_F(ThreadPool, RunsEveryTaskOnce) {
  for (int64_t count : {0, 1, 2, 3, 4, 5, 1000}) {
    std::vector<std::atomic<int>> runs(static_cast<size_t>(count));
    parallel_for(count, [&](int64_t i) { ++runs[static_cast<size_t>(i)]; });
    for (const auto& n : runs) EXPECT_EQ(n, 1);
  }
}

TEST_F(ThreadPool, CarriesWhatATaskThrowsToTheCaller) {
  for (int64_t count : {1, 2, 1000}) {
    std::atomic<int64_t> ended = 0;
    EXPECT_THROW(parallel_for(count,
                              [&](int64_t i) {
                                if (i % 7 == 0) throw std::bad_alloc();
                                ++ended;
                              }),
                 std::bad_alloc);
    EXPECT_EQ(ended, count - (count + 6) / 7);
    EXPECT_EQ(sum_of_tasks(7), 28);
  }
}

TEST_F(ThreadPool, ManyJobsInARow) {
  for (int i = 0; i < 20000; ++i) ASSERT_EQ(sum_of_tasks(7), 28);
}

TEST_F(ThreadPool, PiecesCoverTheRange) {
  std::vector<std::atomic<int>> seen(103);
  parallel_for_pieces(103, 10, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) ++seen[static_cast<size_t>(i)];
  });
  for (const auto& n : seen) EXPECT_EQ(n, 1);
}

TEST_F(ThreadPool, ACallInsideATaskRunsInline) {
  std::atomic<int64_t> sum = 0;
  parallel_for(8, [&](int64_t) { sum += sum_of_tasks(10); });
  EXPECT_EQ(sum, 8 * 55);
}

TEST_F(ThreadPool, SeveralThreadsMayCall) {
  std::vector<std::thread> callers;
  std::atomic<int> wrong = 0;
  for (int t = 0; t < 4; ++t)
    callers.emplace_back([&] {
      for (int i = 0; i < 2000; ++i) wrong += sum_of_tasks(9) != 45;
    });
  for (auto& caller : callers) caller.join();
  EXPECT_EQ(wrong, 0);
}

TEST_F(ThreadPool, WorksInAForkedChild) {
  ASSERT_EQ(sum_of_tasks(100), 5050);
  const pid_t child = fork();
  if (child == 0) _exit(sum_of_tasks(100) == 5050 ? 0 : 1);
  int status = 0;
  waitpid(child, &status, 0);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

TEST_F(ThreadPool, TheCountCanChange) {
  for (int count : {1, 2, 5, 1}) {
    set_num_threads(count);
    EXPECT_EQ(num_threads(), count);
    EXPECT_EQ(sum_of_tasks(50), 1275);
  }
  EXPECT_THROW(set_num_threads(0), InvalidArgument);
}

TEST_F(ThreadPool, AnExecutorOfTheCallerRunsTheTasks) {
  struct Counter {
    int64_t tasks = 0;
    static void run(void* context, int64_t count, void (*task)(void*, int64_t), void* task_context) {
      for (int64_t i = count; i-- > 0;) task(task_context, i);
      static_cast<Counter*>(context)->tasks += count;
    }
  } counter;
  const Executor executor{sizeof(Executor), &counter, 3, Counter::run};
  set_executor(&executor);
  EXPECT_EQ(num_threads(), 3);
  EXPECT_EQ(sum_of_tasks(50), 1275);
  set_executor(nullptr);
  EXPECT_EQ(counter.tasks, 50);
  EXPECT_EQ(num_threads(), 4);
  const Executor broken{sizeof(Executor), nullptr, 1, nullptr};
  EXPECT_THROW(set_executor(&broken), InvalidArgument);
}

}  // namespace
}  // namespace quantrature
