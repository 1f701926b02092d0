#include "services/loader/memory_budget.h"

#include <atomic>
#include <thread>
#include <vector>

#include "gtest/gtest.h"

namespace sluice::loader {
namespace {

TEST(MemoryBudgetTest, GivesBackWhatAShareHeld) {
  MemoryBudget budget(10);
  for (int i = 0; i < 3; ++i) {
    const MemoryBudget::Share share = budget.Acquire(10, std::stop_token());
    EXPECT_TRUE(share);
  }
  MemoryBudget::Share kept = budget.Acquire(6, std::stop_token());
  MemoryBudget::Share moved = std::move(kept);
  moved = budget.Acquire(4, std::stop_token());  // Swapped; the 6 go when the temporary dies.
  EXPECT_TRUE(budget.Acquire(6, std::stop_token()));
}

TEST(MemoryBudgetTest, GrantsMoreThanItHasWhenNothingIsHeld) {
  MemoryBudget budget(10);
  EXPECT_TRUE(budget.Acquire(1000, std::stop_token()));
}

TEST(MemoryBudgetTest, StopEndsTheWaitAndTheNextIsServed) {
  MemoryBudget budget(10);
  MemoryBudget::Share first = budget.Acquire(10, std::stop_token());
  std::atomic<bool> second_granted = false, third_granted = false;
  std::jthread second(
      [&](const std::stop_token& stop) { second_granted = bool(budget.Acquire(10, stop)); });
  std::jthread third([&] { third_granted = bool(budget.Acquire(10, std::stop_token())); });
  second.request_stop();
  second.join();
  EXPECT_FALSE(second_granted);
  first = MemoryBudget::Share();
  third.join();
  EXPECT_TRUE(third_granted);
}

TEST(MemoryBudgetTest, NeverExceedsTheCapacity) {
  MemoryBudget budget(10);
  std::atomic<int> held = 0, most = 0;
  std::vector<std::jthread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&budget, &held, &most, t] {
      for (int i = 0; i < 200; ++i) {
        const int bytes = 1 + (i + t) % 5;
        const MemoryBudget::Share share = budget.Acquire(bytes, std::stop_token());
        const int now = held += bytes;
        for (int seen = most; now > seen && !most.compare_exchange_weak(seen, now);) {
        }
        held -= bytes;
      }
    });
  }
  threads.clear();  // Joins.
  EXPECT_LE(most, 10);
}

}  // namespace
}  // namespace sluice::loader
