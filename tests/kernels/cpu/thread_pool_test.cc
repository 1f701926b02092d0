#include "kernels/cpu/thread_pool.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <numeric>
#include <vector>

#include "gtest/gtest.h"

namespace sluice {
namespace {

class ThreadPoolTest : public testing::TestWithParam<int> {};

TEST_P(ThreadPoolTest, CallsEachIndexOnce) {
  ThreadPool pool(GetParam());
  for (const int64_t count : {0, 1, 2, 3, 100, 5000}) {
    std::vector<std::atomic<int>> calls(count);
    std::atomic<bool> thread_in_range = true;
    pool.ParallelFor(count, [&](int64_t i, int thread) {
      calls[i].fetch_add(1);
      if (thread < 0 || thread >= GetParam()) thread_in_range = false;
    });
    for (int64_t i = 0; i < count; ++i) ASSERT_EQ(calls[i].load(), 1) << i << " of " << count;
    EXPECT_TRUE(thread_in_range);
  }
}

// What one operation wrote is seen by the next, whichever thread runs it: steps rely on it.
TEST_P(ThreadPoolTest, OperationsFollowEachOther) {
  ThreadPool pool(GetParam());
  std::vector<int64_t> a(64, 0), b(64, 0);
  for (int64_t round = 1; round <= 3000; ++round) {
    pool.ParallelFor(64, [&](int64_t i, int) { a[i] = b[63 - i] + 1; });
    pool.ParallelFor(64, [&](int64_t i, int) { b[i] = a[63 - i] + 1; });
  }
  for (const int64_t value : b) ASSERT_EQ(value, 6000);
}

TEST_P(ThreadPoolTest, WorksAfterItsHelpersFellAsleep) {
  ThreadPool pool(GetParam());
  for (int round = 0; round < 20; ++round) {
    std::this_thread::sleep_for(2 * ThreadPool::kSpin);
    std::atomic<int64_t> sum = 0;
    pool.ParallelFor(100, [&](int64_t i, int) { sum += i; });
    EXPECT_EQ(sum.load(), 4950);
  }
}

INSTANTIATE_TEST_SUITE_P(Threads, ThreadPoolTest, testing::Values(1, 2, 3, 8));

TEST(ThreadPoolHelpersTest, HelpersTakePiecesWhileTheCallerIsBusy) {
  ThreadPool pool(2);
  std::mutex mutex;
  std::condition_variable changed;
  bool helped = false;  // Guarded by mutex
  pool.ParallelFor(2, [&](int64_t, int thread) {
    std::unique_lock lock(mutex);
    if (thread == 1 || helped) {
      helped = true;
      changed.notify_all();
    } else {
      changed.wait(lock, [&] { return helped; });  // Hangs when no helper comes
    }
  });
  EXPECT_TRUE(helped);
}

}  // namespace
}  // namespace sluice
