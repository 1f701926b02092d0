#include "services/controller/scheduler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "services/rpc/error_details.h"
#include "tests/services/controller/fake_stage.h"

namespace sluice::controller {
namespace {

using internal::v1::StepHeader;
using internal::v1::TokenFrame;
using std::chrono::milliseconds;
using testing::ElementsAre;
using testing::IsEmpty;
using testing::SizeIs;

SchedulerLimits Limits(uint32_t stages) {
  SchedulerLimits limits;
  limits.stages = stages;
  limits.num_blocks = 64;
  limits.block_size = 4;
  limits.max_batch_tokens = 16;
  limits.max_batch_size = 8;
  limits.max_queue = 4;
  return limits;
}

FakeStage::Limits StageLimits(const SchedulerLimits& limits) {
  return {limits.epoch,      limits.stages,           limits.num_blocks,
          limits.block_size, limits.max_batch_tokens, limits.max_batch_size};
}

RequestSpec Spec(std::vector<uint32_t> prompt, uint32_t max_tokens, uint32_t n = 1) {
  RequestSpec spec;
  spec.prompt = std::move(prompt);
  spec.max_tokens = max_tokens;
  spec.n = n;
  return spec;
}

// A scheduler and its pipeline; the clock stands still unless it is moved.
class SchedulerTest : public testing::Test {
 protected:
  void Make(const SchedulerLimits& limits) {
    scheduler_ = std::make_unique<Scheduler>(limits);
    stage_ = std::make_unique<FakeStage>(StageLimits(limits));
  }

  std::vector<StepHeader> Send() {
    std::vector<StepHeader> steps;
    StepHeader step;
    while (scheduler_->NextStep(now_, &step)) {
      steps.push_back(step);
    }
    return steps;
  }

  void Return(const StepHeader& step) {
    ASSERT_TRUE(scheduler_->OnFrame(now_, stage_->Run(step)).ok());
    ASSERT_THAT(stage_->errors, IsEmpty());
  }

  // Runs until nothing can be sent.
  void RunAll() {
    std::deque<StepHeader> flying;
    while (true) {
      for (StepHeader& step : Send()) {
        flying.push_back(std::move(step));
      }
      if (flying.empty()) {
        return;
      }
      Return(flying.front());
      flying.pop_front();
    }
  }

  // Tokens of one answer, and how it ended.
  struct Result {
    std::vector<uint32_t> tokens;
    std::vector<EndReason> ends;
    std::vector<absl::StatusCode> failures;
  };
  void Collect() {
    for (const SchedulerEvent& event : scheduler_->TakeEvents()) {
      Result& result = results_[{event.handle, event.choice}];
      switch (event.kind) {
        case SchedulerEvent::Kind::kToken:
          result.tokens.push_back(event.token.token_id());
          break;
        case SchedulerEvent::Kind::kDone:
          result.ends.push_back(event.reason);
          break;
        case SchedulerEvent::Kind::kFailed:
          result.failures.push_back(event.status.code());
          break;
        default:
          break;
      }
    }
  }

  static std::vector<uint32_t> Expected(std::vector<uint32_t> history, uint32_t count,
                                        uint32_t choice = 0) {
    std::vector<uint32_t> tokens;
    for (uint32_t i = 0; i < count; ++i) {
      tokens.push_back(FakeStage::NextToken(history, choice));
      history.push_back(tokens.back());
    }
    return tokens;
  }

  TimePoint now_{std::chrono::hours(1)};
  std::unique_ptr<Scheduler> scheduler_;
  std::unique_ptr<FakeStage> stage_;
  std::map<std::pair<uint64_t, uint32_t>, Result> results_;
};

TEST_F(SchedulerTest, GeneratesMaxTokens) {
  Make(Limits(1));
  ASSERT_TRUE(scheduler_->Submit(now_, 1, Spec({5, 6, 7}, 6)).ok());
  RunAll();
  Collect();
  const Result& result = results_[{1, 0}];
  EXPECT_EQ(result.tokens, Expected({5, 6, 7}, 6));
  EXPECT_THAT(result.ends, ElementsAre(EndReason::kLength));
  EXPECT_EQ(scheduler_->blocks().used(), 0u);
  EXPECT_EQ(stage_->num_tables(), 0u) << "the last release travels in a step without rows";
}

TEST_F(SchedulerTest, RunsAheadByOneStep) {
  Make(Limits(1));
  ASSERT_TRUE(scheduler_->Submit(now_, 1, Spec({5, 6, 7}, 6)).ok());
  const std::vector<StepHeader> steps = Send();
  ASSERT_THAT(steps, SizeIs(2));
  EXPECT_EQ(steps[0].sequences(0).num_tokens(), 3u);
  EXPECT_EQ(steps[1].sequences(0).sampled_by_step(), 1u);
  EXPECT_EQ(steps[1].sequences(0).start_pos(), 3u);
  Return(steps[0]);
  const std::vector<StepHeader> next = Send();
  ASSERT_THAT(next, SizeIs(1));
  EXPECT_EQ(next[0].sequences(0).sampled_by_step(), 2u);
}

TEST_F(SchedulerTest, SendsTheIdWhenItIsKnown) {
  Make(Limits(1));
  ASSERT_TRUE(scheduler_->Submit(now_, 1, Spec({5}, 6)).ok());
  const std::vector<StepHeader> steps = Send();
  Return(steps[0]);
  Return(steps[1]);
  const std::vector<StepHeader> next = Send();
  ASSERT_THAT(next, SizeIs(2));
  EXPECT_EQ(next[0].sequences(0).sampled_by_step(), 0u);
  EXPECT_THAT(next[0].sequences(0).token_ids(), ElementsAre(Expected({5}, 2)[1]));
  EXPECT_EQ(next[1].sequences(0).sampled_by_step(), 3u);
}

TEST_F(SchedulerTest, EndsAtAnEndIdAndDropsWhatRanAhead) {
  Make(Limits(1));
  RequestSpec spec = Spec({5, 6, 7}, 20);
  const std::vector<uint32_t> tokens = Expected({5, 6, 7}, 3);
  spec.end_ids = {tokens[2]};
  ASSERT_EQ(std::count(tokens.begin(), tokens.begin() + 2, tokens[2]), 0);
  ASSERT_TRUE(scheduler_->Submit(now_, 1, spec).ok());
  RunAll();
  Collect();
  EXPECT_EQ((results_[{1, 0}].tokens), tokens);
  EXPECT_THAT((results_[{1, 0}].ends), ElementsAre(EndReason::kStop));
}

TEST_F(SchedulerTest, IgnoresEndIdsBeforeMinTokens) {
  Make(Limits(1));
  RequestSpec spec = Spec({5, 6, 7}, 5);
  spec.end_ids = {Expected({5, 6, 7}, 1)[0]};
  spec.sampling.set_min_tokens(5);
  ASSERT_TRUE(scheduler_->Submit(now_, 1, spec).ok());
  RunAll();
  Collect();
  EXPECT_THAT((results_[{1, 0}].tokens), SizeIs(5));
}

TEST_F(SchedulerTest, SplitsAPromptIntoChunksOverTheSlots) {
  Make(Limits(2));
  ASSERT_TRUE(scheduler_->Submit(now_, 1, Spec(std::vector<uint32_t>(40, 3), 2)).ok());
  const std::vector<StepHeader> steps = Send();
  ASSERT_THAT(steps, SizeIs(3)) << "two stages compute, one step waits";
  EXPECT_EQ(steps[0].slot(), 0u);
  EXPECT_EQ(steps[1].slot(), 1u);
  EXPECT_EQ(steps[0].sequences(0).num_tokens(), 16u);
  EXPECT_EQ(steps[1].sequences(0).start_pos(), 16u);
  EXPECT_EQ(steps[2].sequences(0).num_tokens(), 8u);
  EXPECT_FALSE(steps[1].sequences(0).sample());
  EXPECT_TRUE(steps[2].sequences(0).sample());
}

TEST_F(SchedulerTest, MixesDecodesWithAChunkWithinTheBudget) {
  Make(Limits(1));
  ASSERT_TRUE(scheduler_->Submit(now_, 1, Spec({5}, 8)).ok());
  std::vector<StepHeader> steps = Send();
  ASSERT_TRUE(scheduler_->Submit(now_, 2, Spec(std::vector<uint32_t>(30, 4), 8)).ok());
  Return(steps[0]);
  steps = Send();
  ASSERT_THAT(steps, SizeIs(1));
  ASSERT_EQ(steps[0].sequences_size(), 2);
  EXPECT_EQ(steps[0].sequences(0).num_tokens(), 1u);
  EXPECT_EQ(steps[0].sequences(1).num_tokens(), 15u);
}

TEST_F(SchedulerTest, SplitsDecodesEvenlyOverSlots) {
  Make(Limits(2));
  for (uint64_t handle = 1; handle <= 6; ++handle) {
    ASSERT_TRUE(scheduler_->Submit(now_, handle, Spec({1, 2}, 20)).ok());
  }
  std::deque<StepHeader> flying;
  for (int i = 0; i < 6; ++i) {
    for (StepHeader& step : Send()) {
      flying.push_back(std::move(step));
    }
    Return(flying.front());
    flying.pop_front();
  }
  std::map<uint32_t, int> decodes;
  for (const StepHeader& step : Send()) {
    decodes[step.slot()] = step.sequences_size();
  }
  for (const StepHeader& step : flying) {
    decodes[step.slot()] = step.sequences_size();
  }
  EXPECT_EQ(decodes[0], 3);
  EXPECT_EQ(decodes[1], 3);
}

TEST_F(SchedulerTest, AnswersOfOneRequestDifferByChoice) {
  Make(Limits(2));
  ASSERT_TRUE(scheduler_->Submit(now_, 1, Spec({9, 8}, 5, 3)).ok());
  RunAll();
  Collect();
  for (uint32_t choice = 0; choice < 3; ++choice) {
    EXPECT_EQ((results_[{1, choice}].tokens), Expected({9, 8}, 5, choice));
    EXPECT_THAT((results_[{1, choice}].ends), SizeIs(1));
  }
}

TEST_F(SchedulerTest, RefusesWhenTheQueueIsFull) {
  SchedulerLimits limits = Limits(1);
  limits.max_batch_size = 1;
  limits.max_queue = 2;
  Make(limits);
  for (uint64_t handle = 1; handle <= 3; ++handle) {
    ASSERT_TRUE(scheduler_->Submit(now_, handle, Spec({1}, 4)).ok());
  }
  const absl::Status status = scheduler_->Submit(now_, 4, Spec({1}, 4));
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(rpc::GetDetail<google::rpc::RetryInfo>(status).has_value());
  EXPECT_TRUE(rpc::GetDetail<google::rpc::QuotaFailure>(status).has_value());
  EXPECT_EQ(scheduler_->counts().queued_requests, 2u);
  RunAll();
  Collect();
  EXPECT_THAT(results_, SizeIs(3));
}

TEST_F(SchedulerTest, RefusesWhenTheQueueHoldsTooManyTokens) {
  SchedulerLimits limits = Limits(1);
  limits.max_batch_size = 1;
  limits.max_queue_tokens = 5;
  Make(limits);
  ASSERT_TRUE(scheduler_->Submit(now_, 1, Spec({1, 2}, 4)).ok()) << "runs";
  ASSERT_TRUE(scheduler_->Submit(now_, 2, Spec(std::vector<uint32_t>(9, 3), 4)).ok())
      << "one may always wait";
  const absl::Status status = scheduler_->Submit(now_, 3, Spec({1}, 4));
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(rpc::GetDetail<google::rpc::RetryInfo>(status).has_value());
  scheduler_->Drop(2);
  for (const uint64_t handle : {4u, 5u}) {
    EXPECT_TRUE(scheduler_->Submit(now_, handle, Spec({1, 2}, 4, 2)).ok());
  }
  EXPECT_FALSE(scheduler_->Submit(now_, 6, Spec({1, 2}, 4)).ok());
  RunAll();
  EXPECT_TRUE(scheduler_->Submit(now_, 7, Spec({1}, 4)).ok()) << "the queue is empty again";
}

TEST_F(SchedulerTest, RefusesWhatCanNeverFitWithoutRetry) {
  Make(Limits(1));
  const absl::Status status = scheduler_->Submit(now_, 1, Spec({1}, 64 * 4 + 1));
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_FALSE(rpc::GetDetail<google::rpc::RetryInfo>(status).has_value());
  EXPECT_TRUE(scheduler_->Submit(now_, 1, Spec({1}, 64 * 4)).ok())
      << "the last token needs no room";
}

TEST_F(SchedulerTest, WaitsForBlocksInOrder) {
  SchedulerLimits limits = Limits(1);
  limits.num_blocks = 4;
  Make(limits);
  ASSERT_TRUE(scheduler_->Submit(now_, 1, Spec({1}, 12)).ok());
  ASSERT_TRUE(scheduler_->Submit(now_, 2, Spec({1}, 8)).ok());
  ASSERT_TRUE(scheduler_->Submit(now_, 3, Spec({1}, 2)).ok());
  EXPECT_EQ(scheduler_->counts().running_sequences, 1u) << "the third must not overtake";
  RunAll();
  Collect();
  EXPECT_THAT((results_[{3, 0}].ends), SizeIs(1));
}

TEST_F(SchedulerTest, DropFreesBlocksAtOnceAndReleasesWithTheNextStep) {
  Make(Limits(1));
  ASSERT_TRUE(scheduler_->Submit(now_, 1, Spec({1, 2}, 30)).ok());
  std::vector<StepHeader> steps = Send();
  scheduler_->Drop(1);
  EXPECT_EQ(scheduler_->blocks().used(), 0u);
  ASSERT_TRUE(scheduler_->Submit(now_, 2, Spec({3}, 30)).ok());
  Return(steps[0]);
  const std::vector<StepHeader> next = Send();
  ASSERT_THAT(next, SizeIs(1));
  EXPECT_THAT(next[0].released_seq_ids(), ElementsAre(1));
  Return(steps[1]);
  Return(next[0]);
  Collect();
  EXPECT_TRUE((results_[{1, 0}].tokens.empty()));
}

TEST_F(SchedulerTest, CancelEndsEachAnswerWithCancelled) {
  Make(Limits(1));
  ASSERT_TRUE(scheduler_->Submit(now_, 1, Spec({1, 2}, 30, 2)).ok());
  Send();
  scheduler_->Cancel(1);
  scheduler_->Cancel(1);
  Collect();
  EXPECT_THAT((results_[{1, 0}].ends), ElementsAre(EndReason::kCancelled));
  EXPECT_THAT((results_[{1, 1}].ends), ElementsAre(EndReason::kCancelled));
  EXPECT_EQ(scheduler_->blocks().used(), 0u);
}

TEST_F(SchedulerTest, DropsExpiredRequestsBeforePrefill) {
  SchedulerLimits limits = Limits(1);
  limits.max_batch_size = 1;
  Make(limits);
  ASSERT_TRUE(scheduler_->Submit(now_, 1, Spec({1}, 3)).ok());
  RequestSpec late = Spec({2}, 3);
  late.deadline = now_ + milliseconds(10);
  ASSERT_TRUE(scheduler_->Submit(now_, 2, late).ok());
  now_ += milliseconds(20);
  scheduler_->Expire(now_);
  RunAll();
  Collect();
  EXPECT_THAT((results_[{2, 0}].failures), ElementsAre(absl::StatusCode::kDeadlineExceeded));
  EXPECT_TRUE((results_[{2, 0}].tokens.empty()));
  EXPECT_EQ(scheduler_->Submit(now_, 3, late).code(), absl::StatusCode::kDeadlineExceeded);
}

TEST_F(SchedulerTest, FailsTheRequestWhoseLogitsAreNotFinite) {
  Make(Limits(1));
  ASSERT_TRUE(scheduler_->Submit(now_, 1, Spec({1}, 8)).ok());
  ASSERT_TRUE(scheduler_->Submit(now_, 2, Spec({2}, 2)).ok());
  const std::vector<StepHeader> steps = Send();
  TokenFrame frame = stage_->Run(steps[0]);
  frame.mutable_tokens(0)->set_not_finite(true);
  ASSERT_TRUE(scheduler_->OnFrame(now_, frame).ok());
  Return(steps[1]);
  RunAll();
  Collect();
  EXPECT_THAT((results_[{1, 0}].failures), ElementsAre(absl::StatusCode::kInternal));
  EXPECT_THAT((results_[{2, 0}].ends), ElementsAre(EndReason::kLength));
}

TEST_F(SchedulerTest, IgnoresFramesOfOtherEpochsAndDuplicates) {
  Make(Limits(1));
  ASSERT_TRUE(scheduler_->Submit(now_, 1, Spec({1}, 8)).ok());
  const std::vector<StepHeader> steps = Send();
  TokenFrame frame = stage_->Run(steps[0]);
  TokenFrame old = frame;
  old.set_epoch(0);
  EXPECT_TRUE(scheduler_->OnFrame(now_, old).ok());
  EXPECT_TRUE(scheduler_->OnFrame(now_, frame).ok());
  EXPECT_TRUE(scheduler_->OnFrame(now_, frame).ok());
  Collect();
  EXPECT_THAT((results_[{1, 0}].tokens), SizeIs(1));
}

TEST_F(SchedulerTest, RefusesFramesOutOfOrderAndMissingTokens) {
  Make(Limits(1));
  ASSERT_TRUE(scheduler_->Submit(now_, 1, Spec({1}, 8)).ok());
  const std::vector<StepHeader> steps = Send();
  TokenFrame frame = stage_->Run(steps[0]);
  TokenFrame second = stage_->Run(steps[1]);
  EXPECT_FALSE(scheduler_->OnFrame(now_, second).ok());
  frame.clear_tokens();
  EXPECT_FALSE(scheduler_->OnFrame(now_, frame).ok());
}

TEST_F(SchedulerTest, AStepHangsAfterTwentyMediansOrTwoSeconds) {
  Make(Limits(1));
  EXPECT_FALSE(scheduler_->StepDeadline().has_value());
  ASSERT_TRUE(scheduler_->Submit(now_, 1, Spec({1}, 100)).ok());
  std::deque<StepHeader> flying;
  for (StepHeader& step : Send()) {
    flying.push_back(std::move(step));
  }
  EXPECT_EQ(*scheduler_->StepDeadline(), now_ + std::chrono::seconds(60)) << "nothing is known yet";
  for (int i = 0; i < 20; ++i) {
    now_ += milliseconds(150);
    Return(flying.front());
    flying.pop_front();
    for (StepHeader& step : Send()) {
      flying.push_back(std::move(step));
    }
  }
  // Two steps fly, so a step takes 300 ms from sending to its tokens.
  EXPECT_EQ(*scheduler_->StepDeadline(), now_ + milliseconds(20 * 300));
}

TEST_F(SchedulerTest, FailAllEndsEverything) {
  Make(Limits(2));
  for (uint64_t handle = 1; handle <= 10; ++handle) {
    scheduler_->Submit(now_, handle, Spec({1, 2}, 30)).IgnoreError();
  }
  Send();
  scheduler_->FailAll(absl::UnavailableError("lost"));
  Collect();
  EXPECT_THAT(results_, SizeIs(10));
  for (const auto& [key, result] : results_) {
    EXPECT_THAT(result.failures, ElementsAre(absl::StatusCode::kUnavailable));
  }
  EXPECT_EQ(scheduler_->blocks().used(), 0u);
  EXPECT_EQ(scheduler_->counts().queued_requests, 0u);
}

}  // namespace
}  // namespace sluice::controller
