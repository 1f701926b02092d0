// What a stage does with steps over its life: refusals that change nothing, releases, new plans,
// memory.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "tests/worker/engine/small_model.h"
#include "tests/worker/engine/test_pipeline.h"

namespace sluice::worker {
namespace {

using internal::v1::ShardAssignment;
using internal::v1::StepHeader;
using testing::HasSubstr;

const std::vector<uint32_t> kPrompt = {3, 1, 4, 15, 9, 26, 5};

std::vector<uint32_t> ExpectedIds(const SmallModel& model, uint32_t count) {
  TestPipeline pipeline(model, 1);
  TestSequence sequence = MakeSequence(1, kPrompt);
  return pipeline.Generate(&sequence, 7, count);
}

TEST(EngineStepTest, RefusedStepsChangeNothing) {
  const SmallModel model = MakeLlama(3);
  TestPipeline pipeline(model, 1);
  TestSequence sequence = MakeSequence(1, kPrompt);
  pipeline.Generate(&sequence, 3, 2);

  // One good slice and a release together with one bad slice: none of it may happen.
  TestSequence other = MakeSequence(2, {1, 2, 3});
  TestSequence copy = sequence;
  StepHeader header;
  header.add_released_seq_ids(77);
  *header.add_sequences() = pipeline.NextSlice(&copy, 1, /*sample=*/true);
  *header.add_sequences() = pipeline.NextSlice(&other, 3, /*sample=*/true);
  header.mutable_sequences(1)->set_token_ids(1, 61);
  EXPECT_EQ(pipeline.Run(header).status().code(), absl::StatusCode::kInvalidArgument);

  header.mutable_sequences(1)->set_token_ids(1, 2);
  header.mutable_sequences(1)->add_new_block_ids(64);
  EXPECT_EQ(pipeline.Run(header).status().code(), absl::StatusCode::kInvalidArgument);

  StepHeader release;
  release.add_released_seq_ids(1);
  release.mutable_sequences()->CopyFrom(header.sequences());
  EXPECT_EQ(pipeline.Run(release).status().code(), absl::StatusCode::kInvalidArgument);

  EXPECT_EQ(pipeline.Generate(&sequence, 1, 8), ExpectedIds(model, 8));
}

TEST(EngineStepTest, LaterStagesRefuseWrongHiddenBytes) {
  const SmallModel model = MakeOpt(3);
  TestPipeline pipeline(model, 2);
  TestSequence sequence = MakeSequence(1, kPrompt);
  StepHeader header;
  header.set_step(1);
  *header.add_sequences() = pipeline.NextSlice(&sequence, 7, /*sample=*/true);
  StageEngine::StepOutput output;
  ASSERT_TRUE(pipeline.stage(0).Step({.header = &header}, &output).ok());
  EXPECT_EQ(output.hidden_states.size(),
            7 * static_cast<size_t>(pipeline.stage(0).hidden_row_bytes()));
  StageEngine::StepOutput last;
  StageEngine::StepInput input{.header = &header,
                               .hidden_states = output.hidden_states.data(),
                               .hidden_bytes = output.hidden_states.size() - 1};
  const absl::Status status = pipeline.last().Step(input, &last);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("hidden_states"));
  input.hidden_bytes += 1;
  ASSERT_TRUE(pipeline.last().Step(input, &last).ok());
  EXPECT_EQ(last.tokens.tokens(0).token_id(), ExpectedIds(model, 1)[0]);
}

TEST(EngineStepTest, NotFiniteRowsAreMarkedAndStayAlone) {
  const SmallModel model = MakeLlama(3);
  TestPipeline pipeline(model, 2);
  TestSequence broken = MakeSequence(1, kPrompt);
  TestSequence good = MakeSequence(2, kPrompt);
  StepHeader header;
  header.set_step(1);
  *header.add_sequences() = pipeline.NextSlice(&broken, 7, /*sample=*/true);
  *header.add_sequences() = pipeline.NextSlice(&good, 7, /*sample=*/true);
  StageEngine::StepOutput output;
  ASSERT_TRUE(pipeline.stage(0).Step({.header = &header}, &output).ok());
  ASSERT_EQ(pipeline.stage(0).hidden_dtype(), DType::kF32);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  std::memcpy(output.hidden_states.data(), &nan, sizeof(nan));
  StageEngine::StepOutput last;
  const StageEngine::StepInput input{.header = &header,
                                     .hidden_states = output.hidden_states.data(),
                                     .hidden_bytes = output.hidden_states.size()};
  ASSERT_TRUE(pipeline.last().Step(input, &last).ok());
  ASSERT_EQ(last.tokens.tokens_size(), 2);
  EXPECT_TRUE(last.tokens.tokens(0).not_finite());
  EXPECT_LT(last.tokens.tokens(0).token_id(), 61u);
  EXPECT_FALSE(last.tokens.tokens(1).not_finite());
  EXPECT_EQ(last.tokens.tokens(1).token_id(), ExpectedIds(model, 1)[0]);
}

TEST(EngineStepTest, FramesCarryTheStep) {
  const SmallModel model = MakeOpt(3);
  TestPipeline pipeline(model, 1);
  TestSequence sequence = MakeSequence(41, kPrompt);
  StepHeader header;
  header.set_epoch(9);
  header.set_step(12);
  header.set_slot(1);
  *header.add_sequences() = pipeline.NextSlice(&sequence, 6, /*sample=*/false);
  auto frame = pipeline.Run(header);
  ASSERT_TRUE(frame.ok()) << frame.status();
  EXPECT_EQ(frame->epoch(), 9u);
  EXPECT_EQ(frame->step(), 12u);
  EXPECT_EQ(frame->slot(), 1u);
  EXPECT_EQ(frame->tokens_size(), 0);
  frame = pipeline.RunSlice(&sequence, 1, /*sample=*/true);
  EXPECT_EQ(frame->step(), 13u);
  ASSERT_EQ(frame->tokens_size(), 1);
  EXPECT_EQ(frame->tokens(0).seq_id(), 41u);
  EXPECT_EQ(frame->tokens(0).token_index(), 0u);
}

TEST(EngineStepTest, ReleasedBlocksServeTheNextSequence) {
  const SmallModel model = MakeLlama(3);
  const std::vector<uint32_t> expected = ExpectedIds(model, 20);
  TestPipeline pipeline(model, 2, [](ShardAssignment* a) { a->set_num_blocks(8); });
  for (uint64_t seq_id = 1; seq_id <= 5; ++seq_id) {
    TestSequence sequence = MakeSequence(seq_id, kPrompt);
    EXPECT_EQ(pipeline.Generate(&sequence, 4, 20), expected) << seq_id;
    pipeline.FreeBlocks(&sequence);
    StepHeader release;
    release.add_released_seq_ids(seq_id);
    const auto frame = pipeline.Run(release);
    ASSERT_TRUE(frame.ok()) << frame.status();
    EXPECT_EQ(frame->tokens_size(), 0);
  }
}

TEST(EngineStepTest, ReconfigureForgetsSequencesAndTakesNewNumbers) {
  const SmallModel model = MakeTiedDynamicLlama(3);
  TestPipeline pipeline(model, 1);
  TestSequence sequence = MakeSequence(1, kPrompt);
  pipeline.RunSlice(&sequence, 7, /*sample=*/true);

  ShardAssignment same = pipeline.last().assignment();
  same.add_next_addresses("unix:/elsewhere");
  ASSERT_TRUE(pipeline.last().Reconfigure(same).ok());
  EXPECT_EQ(pipeline.last().assignment().next_addresses_size(), 1);
  const uint64_t kv_bytes = pipeline.last().memory().kv_bytes;

  ShardAssignment smaller = same;
  smaller.set_num_blocks(16);
  smaller.set_max_batch_tokens(8);
  ASSERT_TRUE(pipeline.last().Reconfigure(smaller).ok());
  EXPECT_EQ(pipeline.last().memory().kv_bytes * 4, kv_bytes);

  // Step numbers begin anew, and the sequence is gone.
  TestSequence again = MakeSequence(1, kPrompt);
  StepHeader header;
  header.set_step(1);
  auto* slice = header.add_sequences();
  *slice = pipeline.NextSlice(&again, 7, /*sample=*/true);
  slice->clear_new_block_ids();
  slice->add_new_block_ids(15);
  slice->add_new_block_ids(0);
  const auto frame = pipeline.Run(header);
  ASSERT_TRUE(frame.ok()) << frame.status();
  EXPECT_EQ(frame->tokens(0).token_id(), ExpectedIds(model, 1)[0]);
}

TEST(EngineStepTest, ReconfigureRefusesAnotherShard) {
  const SmallModel model = MakeLlama(3);
  TestPipeline pipeline(model, 3);
  const ShardAssignment held = pipeline.stage(1).assignment();
  const auto refused = [&](const ShardAssignment& assignment) {
    return pipeline.stage(1).Reconfigure(assignment).code();
  };
  ShardAssignment other = held;
  other.set_model_digest("another");
  EXPECT_EQ(refused(other), absl::StatusCode::kFailedPrecondition);
  other = MakeAssignment(model, 0, 3);
  EXPECT_EQ(refused(other), absl::StatusCode::kFailedPrecondition);
  other = held;
  other.mutable_config()->set_norm_eps(1e-6f);
  EXPECT_EQ(refused(other), absl::StatusCode::kFailedPrecondition);
  other = held;
  other.set_block_size(0);
  EXPECT_EQ(refused(other), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(pipeline.stage(1).assignment().SerializeAsString(), held.SerializeAsString());
  TestSequence sequence = MakeSequence(1, kPrompt);
  EXPECT_EQ(pipeline.Generate(&sequence, 7, 3), ExpectedIds(model, 3));
}

TEST(EngineStepTest, AFailedReconfigureCanBeMendedByAnother) {
  const SmallModel model = MakeLlama(3);
  TestPipeline pipeline(model, 1);
  const ShardAssignment good = pipeline.last().assignment();
  ShardAssignment huge = good;
  huge.set_num_blocks(1 << 30);
  huge.set_block_size(1 << 12);
  EXPECT_EQ(pipeline.last().Reconfigure(huge).code(), absl::StatusCode::kResourceExhausted);
  TestSequence sequence = MakeSequence(1, kPrompt), again = sequence;
  StepHeader header;
  *header.add_sequences() = pipeline.NextSlice(&sequence, 7, /*sample=*/true);
  EXPECT_EQ(pipeline.Run(header).status().code(), absl::StatusCode::kFailedPrecondition);
  ASSERT_TRUE(pipeline.last().Reconfigure(good).ok());
  EXPECT_EQ(pipeline.Generate(&again, 7, 3), ExpectedIds(model, 3));
}

TEST(EngineStepTest, MemoryCountsWhatTheStageHolds) {
  const SmallModel model = MakeLlama(3);
  TestPipeline whole(model, 1), cut(model, 3);
  const StageMemory all = whole.last().memory();
  EXPECT_EQ(all.kv_bytes, 3u * 2 * 64 * 4 * 2 * 10 * sizeof(float));
  uint64_t weights = 0, kv = 0;
  for (size_t stage = 0; stage < 3; ++stage) {
    weights += cut.stage(stage).memory().weight_bytes;
    kv += cut.stage(stage).memory().kv_bytes;
    EXPECT_GT(cut.stage(stage).memory().workspace_bytes, 0u);
  }
  EXPECT_EQ(weights, all.weight_bytes);
  EXPECT_EQ(kv, all.kv_bytes);
}

TEST(EngineStepTest, RefusesAssignmentsThatDoNotFit) {
  const SmallModel model = MakeOpt(3);
  auto backend = MakeCpuBackend(1);
  ASSERT_TRUE(backend.ok()) << backend.status();
  const auto message = [&](const std::function<void(ShardAssignment*)>& change) {
    ShardAssignment assignment = MakeAssignment(model, 0, 2);
    change(&assignment);
    const auto loader = StageEngine::NewLoader(assignment, backend->get());
    EXPECT_EQ(loader.status().code(), absl::StatusCode::kInvalidArgument);
    return std::string(loader.status().message());
  };
  EXPECT_THAT(message([](auto* a) { a->mutable_layers()->set_end(4); }), HasSubstr("layers"));
  EXPECT_THAT(message([](auto* a) { a->mutable_layers()->set_end(0); }), HasSubstr("layers"));
  EXPECT_THAT(message([](auto* a) { a->set_stage(2); }), HasSubstr("stage"));
  EXPECT_THAT(message([](auto* a) { a->set_has_head(true); }), HasSubstr("has_head"));
  EXPECT_THAT(message([](auto* a) { a->set_has_embedding(false); }), HasSubstr("has_embedding"));
  EXPECT_THAT(message([](auto* a) { a->set_num_blocks(0); }), HasSubstr("num_blocks"));
  EXPECT_THAT(message([](auto* a) { a->set_max_batch_size(41); }), HasSubstr("max_batch_size"));
  EXPECT_THAT(message([](auto* a) { a->set_max_model_len(65); }), HasSubstr("max_model_len"));
  EXPECT_THAT(message([](auto* a) { a->mutable_config()->set_num_kv_heads(3); }),
              HasSubstr("num_kv_heads"));
  EXPECT_THAT(message([](auto* a) { a->mutable_config()->clear_architecture(); }),
              HasSubstr("architecture"));
  EXPECT_THAT(message([](auto* a) { a->mutable_config()->clear_activation(); }),
              HasSubstr("activation"));
}

}  // namespace
}  // namespace sluice::worker
