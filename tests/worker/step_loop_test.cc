// The engine's thread: order, ring inputs, back-pressure, errors, stopping. No gRPC.
#include "worker/step_loop.h"

#include <gtest/gtest.h>

#include <future>
#include <string>

#include "tests/worker/fake_engine.h"

namespace sluice::worker {
namespace {

// Collects results; holds them back while closed.
class FakeSink final : public StepSink {
 public:
  bool Send(FinishedStep step) override {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return open_; });
    done_.push_back(std::move(step));
    changed_.notify_all();
    return true;
  }
  void SetOpen(bool open) {
    std::lock_guard<std::mutex> lock(mutex_);
    open_ = open;
    changed_.notify_all();
  }
  FinishedStep Wait(size_t index) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return done_.size() > index; });
    return done_[index];
  }
  size_t count() {
    std::lock_guard<std::mutex> lock(mutex_);
    return done_.size();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool open_ = true;
  std::vector<FinishedStep> done_;
};

StepWork Work(uint64_t step, const std::vector<uint32_t>& ids, uint64_t sampled_by = 0) {
  StepWork work;
  work.header = OneSequenceStep(1, step, ids, sampled_by);
  return work;
}

internal::v1::TokenFrame Sampled(uint64_t step, uint32_t token) {
  internal::v1::TokenFrame frame;
  frame.set_epoch(1);
  frame.set_step(step);
  auto* sampled = frame.add_tokens();
  sampled->set_seq_id(1);
  sampled->set_token_id(token);
  return frame;
}

void NoError(const absl::Status& status) { ADD_FAILURE() << status; }

TEST(StepLoop, OneStageRunsAheadWithoutARing) {
  FakeEngine engine(FakeAssignment(0, 1), 2);
  FakeSink sink;
  StepLoop loop(&engine, &sink, NoError);
  ASSERT_TRUE(loop.Push(Work(1, {10, 11})).ok());
  ASSERT_TRUE(loop.Push(Work(2, {}, 1)).ok());
  ASSERT_TRUE(loop.Push(Work(3, {}, 2)).ok());
  EXPECT_EQ(sink.Wait(0).tokens.tokens(0).token_id(), 12u);
  EXPECT_EQ(sink.Wait(1).tokens.tokens(0).token_id(), 13u);
  const FinishedStep third = sink.Wait(2);
  EXPECT_EQ(third.tokens.tokens(0).token_id(), 14u);
  EXPECT_EQ(third.tokens.epoch(), 1u);
  EXPECT_EQ(third.tokens.step(), 3u);
  EXPECT_EQ(third.tokens.stage_us_size(), 1);
  EXPECT_EQ(third.tokens.wait_us_size(), 1);
  EXPECT_EQ(loop.TakeStats().steps, 3u);
}

TEST(StepLoop, StageZeroWaitsForTheRing) {
  FakeEngine engine(FakeAssignment(0, 2), 2);
  FakeSink sink;
  StepLoop loop(&engine, &sink, NoError);
  ASSERT_TRUE(loop.Push(Work(1, {10})).ok());
  ASSERT_TRUE(loop.Push(Work(2, {}, 1)).ok());
  ASSERT_TRUE(loop.Push(Work(3, {50})).ok());
  sink.Wait(0);
  EXPECT_EQ(sink.count(), 1u);  // Steps stay in order: 3 must not overtake 2
  ASSERT_TRUE(loop.PushSampled(Sampled(1, 12)).ok());
  const FinishedStep second = sink.Wait(1);
  EXPECT_EQ(second.hidden_states, (std::vector<uint8_t>{13, 0, 0, 0, 13, 0, 0, 0}));
  EXPECT_EQ(sink.Wait(2).header.step(), 3u);
}

TEST(StepLoop, RingMayComeBeforeTheStep) {
  FakeEngine engine(FakeAssignment(0, 2), 1);
  FakeSink sink;
  StepLoop loop(&engine, &sink, NoError);
  ASSERT_TRUE(loop.Push(Work(1, {10})).ok());
  ASSERT_TRUE(loop.PushSampled(Sampled(1, 12)).ok());
  ASSERT_TRUE(loop.Push(Work(2, {}, 1)).ok());
  EXPECT_EQ(sink.Wait(1).header.step(), 2u);
}

TEST(StepLoop, RefusesStepsAndFramesOutOfOrder) {
  FakeEngine engine(FakeAssignment(0, 2), 1);
  FakeSink sink;
  StepLoop loop(&engine, &sink, NoError);
  EXPECT_EQ(loop.Push(Work(2, {1})).code(), absl::StatusCode::kInvalidArgument);
  ASSERT_TRUE(loop.Push(Work(1, {1})).ok());
  EXPECT_EQ(loop.Push(Work(1, {1})).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(loop.PushSampled(Sampled(2, 1)).code(), absl::StatusCode::kInvalidArgument);
  ASSERT_TRUE(loop.PushSampled(Sampled(1, 1)).ok());
  EXPECT_EQ(loop.PushSampled(Sampled(1, 1)).code(), absl::StatusCode::kInvalidArgument);
}

TEST(StepLoop, FullQueueHoldsTheSenderUntilStopped) {
  FakeEngine engine(FakeAssignment(0, 1), 1);
  FakeSink sink;
  sink.SetOpen(false);
  StepLoop loop(&engine, &sink, NoError);
  std::promise<absl::Status> result;
  std::thread sender([&] {
    absl::Status status = absl::OkStatus();
    for (uint64_t step = 1; status.ok(); ++step) {
      status = loop.Push(Work(step, {1}));
    }
    result.set_value(status);
  });
  while (loop.TakeStats().queue_depth < 4) {  // Capacity of one stage
    std::this_thread::yield();
  }
  loop.Stop();
  EXPECT_EQ(result.get_future().get().code(), absl::StatusCode::kCancelled);
  sender.join();
  sink.SetOpen(true);
}

TEST(StepLoop, ReportsAFailedStepOnceAndStopsComputing) {
  FakeEngine engine(FakeAssignment(0, 1), 1);
  FakeSink sink;
  std::promise<absl::Status> error;
  StepLoop loop(&engine, &sink, [&](const absl::Status& status) { error.set_value(status); });
  ASSERT_TRUE(loop.Push(Work(1, {FakeEngine::kPoison - 1})).ok());
  ASSERT_TRUE(loop.Push(Work(2, {FakeEngine::kPoison - 1})).ok());
  const absl::Status status = error.get_future().get();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(std::string(status.message()), "step 1: poisoned row");
  EXPECT_EQ(sink.count(), 0u);
}

}  // namespace
}  // namespace sluice::worker
