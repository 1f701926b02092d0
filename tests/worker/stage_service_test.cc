// The Stage service over a real connection: which frames it takes and with what code it refuses the
// others.
#include "worker/stage_service.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "services/rpc/channel.h"
#include "services/rpc/crc32c.h"
#include "services/rpc/server_runner.h"
#include "tests/worker/fake_engine.h"

namespace sluice::worker {
namespace {

using internal::v1::LinkRequest;
using internal::v1::LinkResponse;
using internal::v1::RingRequest;
using internal::v1::RingResponse;
using internal::v1::StepRequest;
using internal::v1::StepResponse;
using ::testing::HasSubstr;

constexpr uint64_t kEpoch = 3;
constexpr int64_t kWords = 4;

// Counts results.
class CountingSink final : public StepSink {
 public:
  bool Send(FinishedStep step) override {
    std::lock_guard<std::mutex> lock(mutex_);
    last_ = std::move(step);
    ++count_;
    changed_.notify_all();
    return true;
  }
  FinishedStep WaitFor(int count) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return count_ >= count; });
    return last_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int count_ = 0;
  FinishedStep last_;
};

class StageServiceTest : public ::testing::Test {
 protected:
  void SetUp() override {
    rpc::ServerOptions options;
    options.addresses = {"127.0.0.1:0"};
    server_ = *rpc::ServerRunner::Start(options, {&service_});
    stub_ = internal::v1::Stage::NewStub(rpc::MakeChannel(
        "127.0.0.1:" + std::to_string(server_->ports().front()), rpc::ChannelKind::kLink));
  }
  void TearDown() override { CloseSession(); }

  void OpenSession(uint32_t stage, uint32_t stages) {
    ASSERT_TRUE(service_.Promise(kEpoch).ok());
    engine_ = std::make_unique<FakeEngine>(FakeAssignment(stage, stages), kWords);
    loop_ = std::make_unique<StepLoop>(engine_.get(), &sink_, [](const absl::Status&) {});
    StageService::Session session;
    session.stage = stage;
    session.stages = stages;
    session.format.epoch = kEpoch;
    session.format.row_bytes = kWords * 4;
    session.format.dtype = DType::kI32;
    session.format.max_tokens = 64;
    session.loop = loop_.get();
    service_.Open(session);
  }
  void CloseSession() {
    if (loop_ != nullptr) {
      loop_->Stop();
      service_.Close();
      loop_.reset();
    }
  }

  // A whole step of one row `word` on a link.
  static LinkRequest LinkStep(uint64_t epoch, uint64_t step, uint32_t word) {
    LinkRequest request;
    auto* frame = request.mutable_frame();
    *frame->mutable_header() = OneSequenceStep(epoch, step, {1});
    const std::vector<uint32_t> row(kWords, word);
    frame->set_hidden_states(row.data(), row.size() * 4);
    frame->set_crc32c(rpc::Crc32c(row.data(), row.size() * 4));
    frame->set_dtype(static_cast<uint32_t>(DType::kI32));
    frame->set_last(true);
    return request;
  }
  // Sends the frames on one stream; the status with which the stage ends it.
  grpc::Status LinkStatus(const std::vector<LinkRequest>& requests) {
    grpc::ClientContext context;
    auto stream = stub_->Link(&context);
    for (const auto& request : requests) {
      stream->Write(request);
    }
    LinkResponse response;
    while (stream->Read(&response)) {
      acknowledged_ = response.step();
    }
    return stream->Finish();
  }
  static void ExpectStatus(const grpc::Status& status, grpc::StatusCode code, const char* text) {
    EXPECT_EQ(status.error_code(), code) << status.error_message();
    EXPECT_THAT(status.error_message(), HasSubstr(text));
  }

  StageService service_;
  std::unique_ptr<rpc::ServerRunner> server_;
  std::unique_ptr<internal::v1::Stage::Stub> stub_;
  CountingSink sink_;
  std::unique_ptr<FakeEngine> engine_;
  std::unique_ptr<StepLoop> loop_;
  uint64_t acknowledged_ = 0;
};

TEST_F(StageServiceTest, RefusesStepsUntilConfigured) {
  ExpectStatus(LinkStatus({LinkStep(kEpoch, 1, 5)}), grpc::StatusCode::FAILED_PRECONDITION,
               "takes no steps");
}

TEST_F(StageServiceTest, RefusesOtherEpochs) {
  OpenSession(1, 2);
  ExpectStatus(LinkStatus({LinkStep(kEpoch - 1, 1, 5)}), grpc::StatusCode::FAILED_PRECONDITION,
               "below 3");
  ExpectStatus(LinkStatus({LinkStep(kEpoch + 1, 1, 5)}), grpc::StatusCode::FAILED_PRECONDITION,
               "epoch 4");
  EXPECT_EQ(service_.Promise(kEpoch).code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(service_.promised(), kEpoch);
}

TEST_F(StageServiceTest, RefusesTheWrongKindOfStream) {
  OpenSession(1, 2);
  grpc::ClientContext context;
  auto steps = stub_->Step(&context);
  StepRequest request;
  *request.mutable_frame()->mutable_header() = OneSequenceStep(kEpoch, 1, {1});
  request.mutable_frame()->set_last(true);
  steps->Write(request);
  ExpectStatus(steps->Finish(), grpc::StatusCode::FAILED_PRECONDITION, "stage 1");
  grpc::ClientContext ring_context;
  auto ring = stub_->Ring(&ring_context);
  RingRequest frame;
  frame.mutable_frame()->set_epoch(kEpoch);
  frame.mutable_frame()->set_step(1);
  ring->Write(frame);
  ExpectStatus(ring->Finish(), grpc::StatusCode::FAILED_PRECONDITION, "ring");
}

TEST_F(StageServiceTest, EndsAStreamThatBreaksARule) {
  OpenSession(1, 2);
  LinkRequest damaged = LinkStep(kEpoch, 1, 5);
  (*damaged.mutable_frame()->mutable_hidden_states())[2] ^= 1;
  ExpectStatus(LinkStatus({damaged}), grpc::StatusCode::DATA_LOSS, "crc32c");
  LinkRequest missing = LinkStep(kEpoch, 1, 5);
  missing.mutable_frame()->set_last(false);
  ExpectStatus(LinkStatus({missing, LinkStep(kEpoch, 2, 5)}), grpc::StatusCode::INVALID_ARGUMENT,
               "before step 1 is whole");
  LinkRequest no_header = LinkStep(kEpoch, 1, 5);
  no_header.mutable_frame()->clear_header();
  ExpectStatus(LinkStatus({no_header}), grpc::StatusCode::INVALID_ARGUMENT, "header");
  ExpectStatus(LinkStatus({LinkStep(kEpoch, 1, 5), LinkStep(kEpoch, 1, 5)}),
               grpc::StatusCode::INVALID_ARGUMENT, "next step is 2");
  EXPECT_EQ(acknowledged_, 1u);
  ExpectStatus(LinkStatus({LinkStep(kEpoch, 7, 5)}), grpc::StatusCode::INVALID_ARGUMENT,
               "next step is 2");
  EXPECT_EQ(sink_.WaitFor(1).tokens.tokens(0).token_id(), 6u);
}

TEST_F(StageServiceTest, RingInputMayComeLate) {
  OpenSession(0, 2);
  grpc::ClientContext context;
  auto steps = stub_->Step(&context);
  StepRequest request;
  StepResponse response;
  request.mutable_frame()->set_last(true);
  for (uint64_t step = 1; step <= 2; ++step) {
    *request.mutable_frame()->mutable_header() =
        OneSequenceStep(kEpoch, step, {20}, /*sampled_by=*/step - 1);
    ASSERT_TRUE(steps->Write(request));
    ASSERT_TRUE(steps->Read(&response));
    EXPECT_EQ(response.step(), step);
  }
  sink_.WaitFor(1);
  grpc::ClientContext ring_context;
  auto ring = stub_->Ring(&ring_context);
  RingRequest frame;
  frame.mutable_frame()->set_epoch(kEpoch);
  frame.mutable_frame()->set_step(1);
  auto* token = frame.mutable_frame()->add_tokens();
  token->set_seq_id(1);
  token->set_token_id(40);
  ASSERT_TRUE(ring->Write(frame));
  RingResponse taken;
  ASSERT_TRUE(ring->Read(&taken));
  EXPECT_EQ(sink_.WaitFor(2).hidden_states[0], 41);
}

TEST_F(StageServiceTest, CloseEndsStreamsThatWaitAndThoseThatAreFull) {
  OpenSession(0, 2);
  grpc::ClientContext context;
  auto steps = stub_->Step(&context);
  StepRequest request;
  request.mutable_frame()->set_last(true);
  for (uint64_t step = 1; step <= 20; ++step) {  // Step 2 waits for the ring; the queue fills
    *request.mutable_frame()->mutable_header() =
        OneSequenceStep(kEpoch, step, {20}, /*sampled_by=*/step - 1);
    ASSERT_TRUE(steps->Write(request));
  }
  while (loop_->TakeStats().queue_depth < 6) {
    std::this_thread::yield();
  }
  CloseSession();
  StepResponse response;
  while (steps->Read(&response)) {
  }
  EXPECT_FALSE(steps->Finish().ok());
}

}  // namespace
}  // namespace sluice::worker
