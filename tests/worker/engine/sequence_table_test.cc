#include "worker/engine/sequence_table.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace sluice::worker {
namespace {

using internal::v1::SequenceSlice;
using testing::ElementsAre;

SequenceSlice MakeSlice(uint64_t seq_id, uint32_t start_pos, const std::vector<uint32_t>& ids,
                        const std::vector<uint32_t>& blocks, bool sample) {
  SequenceSlice slice;
  slice.set_seq_id(seq_id);
  slice.set_start_pos(start_pos);
  slice.set_num_tokens(static_cast<uint32_t>(ids.size()));
  for (const uint32_t id : ids) slice.add_token_ids(id);
  for (const uint32_t block : blocks) slice.add_new_block_ids(block);
  slice.set_sample(sample);
  if (start_pos == 0) slice.set_prompt_len(3);
  return slice;
}

SequenceSlice MakeAheadSlice(uint64_t seq_id, uint32_t start_pos, uint64_t step) {
  SequenceSlice slice = MakeSlice(seq_id, start_pos, {}, {}, /*sample=*/true);
  slice.set_num_tokens(1);
  slice.set_sampled_by_step(step);
  return slice;
}

SequenceTable::Options MakeOptions(bool keep_history) {
  return {.num_blocks = 8, .block_size = 2, .max_model_len = 12, .keep_history = keep_history};
}

TEST(SequenceTableTest, GrowsWithItsSlices) {
  SequenceTable table(MakeOptions(/*keep_history=*/true));
  table.Apply(1, MakeSlice(9, 0, {10, 11}, {5}, /*sample=*/false));
  const Sequence* sequence = table.Apply(2, MakeSlice(9, 2, {12}, {3, 0}, /*sample=*/true));
  EXPECT_EQ(sequence, table.Find(9));
  EXPECT_EQ(sequence->next_pos, 3u);
  EXPECT_EQ(sequence->prompt_len, 3u);
  EXPECT_THAT(sequence->block_table, ElementsAre(5, 3, 0));
  EXPECT_THAT(sequence->tokens, ElementsAre(10, 11, 12));
  EXPECT_EQ(sequence->sampled_step, 2u);
  EXPECT_EQ(table.OwnerOf(3), sequence);
  EXPECT_EQ(table.OwnerOf(1), nullptr);
  EXPECT_EQ(table.free_blocks(), 5u);
  EXPECT_EQ(table.Find(8), nullptr);
}

TEST(SequenceTableTest, KeepsTheSampledIdUntilItIsConsumed) {
  SequenceTable table(MakeOptions(/*keep_history=*/true));
  Sequence* sequence = table.Apply(4, MakeSlice(1, 0, {10, 11, 12}, {0, 1}, /*sample=*/true));
  EXPECT_FALSE(sequence->sampled_id.has_value());
  table.AddSampled(3, 1, 99);  // Another step's
  table.AddSampled(4, 2, 99);  // Another sequence's
  EXPECT_FALSE(sequence->sampled_id.has_value());
  table.AddSampled(4, 1, 20);
  EXPECT_EQ(sequence->sampled_id, 20u);
  table.Apply(5, MakeAheadSlice(1, 3, 4));
  EXPECT_FALSE(sequence->sampled_id.has_value());
  EXPECT_THAT(sequence->tokens, ElementsAre(10, 11, 12, 20));
  table.AddSampled(5, 1, 21);
  EXPECT_THAT(sequence->tokens, ElementsAre(10, 11, 12, 20, 21));
}

TEST(SequenceTableTest, ExplicitIdsWinOverTheSampledOne) {
  SequenceTable table(MakeOptions(/*keep_history=*/true));
  table.Apply(1, MakeSlice(1, 0, {10, 11, 12}, {0, 1}, /*sample=*/true));
  table.AddSampled(1, 1, 20);
  const Sequence* sequence = table.Apply(2, MakeSlice(1, 3, {30}, {}, /*sample=*/false));
  EXPECT_THAT(sequence->tokens, ElementsAre(10, 11, 12, 30));
  table.AddSampled(2, 1, 40);  // Step 2 did not sample
  EXPECT_THAT(sequence->tokens, ElementsAre(10, 11, 12, 30));
}

TEST(SequenceTableTest, ReleaseFreesBlocksAndForgets) {
  SequenceTable table(MakeOptions(/*keep_history=*/true));
  table.Apply(1, MakeSlice(1, 0, {10, 11, 12}, {0, 1}, /*sample=*/true));
  table.Apply(1, MakeSlice(2, 0, {10}, {7}, /*sample=*/true));
  table.AddSampled(1, 1, 20);
  table.Release(77);  // Never seen: nothing happens
  table.Release(1);
  EXPECT_EQ(table.size(), 1u);
  EXPECT_EQ(table.free_blocks(), 7u);
  EXPECT_EQ(table.OwnerOf(0), nullptr);
  // The next sequence starts empty though it may take over the memory.
  const Sequence* next = table.Apply(2, MakeSlice(3, 0, {5}, {1}, /*sample=*/false));
  EXPECT_THAT(next->tokens, ElementsAre(5));
  EXPECT_THAT(next->block_table, ElementsAre(1));
  EXPECT_FALSE(next->sampled_id.has_value());
  table.ReleaseAll();
  EXPECT_EQ(table.size(), 0u);
  EXPECT_EQ(table.free_blocks(), 8u);
}

TEST(SequenceTableTest, KeepsNoTokensBeforeTheLastStage) {
  SequenceTable table(MakeOptions(/*keep_history=*/false));
  SequenceSlice slice = MakeSlice(1, 0, {10, 11, 12}, {0, 1}, /*sample=*/true);
  slice.mutable_sampling()->set_seed(5);
  const Sequence* sequence = table.Apply(1, slice);
  table.AddSampled(1, 1, 20);
  EXPECT_TRUE(sequence->tokens.empty());
  EXPECT_EQ(sequence->sampled_id, 20u);
  EXPECT_EQ(sequence->sampling.seed(), 0u);
}

TEST(SequenceTableTest, StepsOfAKnownSequenceMoveNoVector) {
  SequenceTable table(MakeOptions(/*keep_history=*/true));
  const Sequence* sequence = table.Apply(1, MakeSlice(1, 0, {1}, {0}, /*sample=*/true));
  const uint32_t* blocks = sequence->block_table.data();
  const uint32_t* tokens = sequence->tokens.data();
  for (uint32_t pos = 1; pos < 12; ++pos) {
    table.AddSampled(pos, 1, pos);
    const std::vector<uint32_t> block =
        pos % 2 == 0 ? std::vector<uint32_t>{pos / 2} : std::vector<uint32_t>{};
    table.Apply(pos + 1, MakeSlice(1, pos, {pos}, block, /*sample=*/true));
  }
  table.AddSampled(12, 1, 12);
  EXPECT_EQ(sequence->tokens.size(), 13u);
  EXPECT_EQ(blocks, sequence->block_table.data());
  EXPECT_EQ(tokens, sequence->tokens.data());
}

}  // namespace
}  // namespace sluice::worker
