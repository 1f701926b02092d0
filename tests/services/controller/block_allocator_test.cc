#include "services/controller/block_allocator.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <set>

namespace sluice::controller {
namespace {

TEST(BlockAllocatorTest, HandsOutEveryIdOnce) {
  BlockAllocator blocks(5);
  std::vector<uint32_t> ids;
  ASSERT_TRUE(blocks.Allocate(5, &ids));
  std::sort(ids.begin(), ids.end());
  EXPECT_THAT(ids, testing::ElementsAre(0, 1, 2, 3, 4));
  EXPECT_EQ(blocks.free(), 0u);
  EXPECT_EQ(blocks.used(), 5u);
}

TEST(BlockAllocatorTest, TakesAllOrNone) {
  BlockAllocator blocks(3);
  std::vector<uint32_t> ids;
  EXPECT_FALSE(blocks.Allocate(4, &ids));
  EXPECT_TRUE(ids.empty());
  EXPECT_EQ(blocks.free(), 3u);
}

TEST(BlockAllocatorTest, GivesFreedBlocksAgain) {
  BlockAllocator blocks(2);
  std::vector<uint32_t> first, second;
  ASSERT_TRUE(blocks.Allocate(2, &first));
  blocks.Free({first[1]});
  ASSERT_TRUE(blocks.Allocate(1, &second));
  EXPECT_EQ(second[0], first[1]);
}

TEST(BlockAllocatorDeathTest, EndsTheProcessWhenABlockIsFreedTwice) {
  BlockAllocator blocks(2);
  std::vector<uint32_t> ids;
  ASSERT_TRUE(blocks.Allocate(1, &ids));
  blocks.Free(ids);
  EXPECT_DEATH(blocks.Free(ids), "not used");
}

TEST(BlockAllocatorTest, SumsStayEqualUnderRandomUse) {
  BlockAllocator blocks(40);
  std::mt19937 random(7);
  std::vector<std::vector<uint32_t>> held;
  for (int step = 0; step < 5000; ++step) {
    std::vector<uint32_t> ids;
    if (random() % 2 == 0 && blocks.Allocate(random() % 9, &ids)) {
      held.push_back(ids);
    } else if (!held.empty()) {
      std::swap(held[random() % held.size()], held.back());
      blocks.Free(held.back());
      held.pop_back();
    }
    std::set<uint32_t> distinct;
    size_t count = 0;
    for (const auto& some : held) {
      distinct.insert(some.begin(), some.end());
      count += some.size();
    }
    ASSERT_EQ(distinct.size(), count);
    ASSERT_EQ(blocks.used(), count);
    ASSERT_EQ(blocks.free() + blocks.used() + blocks.cached(), blocks.total());
  }
}

}  // namespace
}  // namespace sluice::controller
