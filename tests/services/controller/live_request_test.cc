#include "services/controller/live_request.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "services/rpc/error_details.h"
#include "tests/services/controller/test_model.h"

namespace sluice::controller {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;
using testing::SizeIs;

class RecordingSink : public ResponseSink {
 public:
  void OnMessage(v1::StreamGenerateResponse&& message) override {
    ASSERT_TRUE(ends.empty()) << "a message after the end";
    messages.push_back(std::move(message));
  }
  void OnEnd(const absl::Status& status) override { ends.push_back(status); }

  // What a client that merges sees.
  v1::StreamGenerateResponse Answer(uint32_t index) const {
    v1::StreamGenerateResponse whole;
    for (v1::StreamGenerateResponse message : messages) {
      if (message.index() == index) {
        EXPECT_EQ(message.token_index(), static_cast<uint32_t>(whole.token_ids_size()));
        MergeMessage(std::move(message), &whole);
      }
    }
    return whole;
  }

  std::vector<v1::StreamGenerateResponse> messages;
  std::vector<absl::Status> ends;
};

class LiveRequestTest : public testing::Test {
 protected:
  static void SetUpTestSuite() { model_ = MakeTestModel(); }
  static void TearDownTestSuite() { model_.reset(); }

  void SetUp() override {
    request_.request_id = "r1";
    request_.tokenizer = model_->tokenizer;
    request_.spec.prompt = {3, 4};
    request_.spec.max_tokens = 50;
    request_.arrival = now_;
  }

  void Start() { live_ = std::make_unique<LiveRequest>(request_, &sink_); }

  // Sends the characters as tokens; true when a stop string ended the answer.
  bool Feed(const std::string& text, uint32_t choice = 0) {
    for (const char c : text) {
      SchedulerEvent event;
      event.kind = SchedulerEvent::Kind::kToken;
      event.choice = choice;
      event.token.set_token_id(IdOf(c));
      event.token.set_token_index(index_[choice]++);
      event.token.set_logprob(-0.5f);
      if (!live_->OnEvent(now_, event).empty()) {
        return true;
      }
    }
    return false;
  }

  void End(EndReason reason, uint32_t choice = 0) {
    SchedulerEvent event;
    event.kind = SchedulerEvent::Kind::kDone;
    event.choice = choice;
    event.reason = reason;
    EXPECT_THAT(live_->OnEvent(now_, event), IsEmpty());
  }

  static std::shared_ptr<const ServedModel> model_;
  TimePoint now_{std::chrono::hours(1)};
  GenerationRequest request_;
  RecordingSink sink_;
  std::unique_ptr<LiveRequest> live_;
  std::map<uint32_t, uint32_t> index_;
};

std::shared_ptr<const ServedModel> LiveRequestTest::model_;

TEST_F(LiveRequestTest, LastMessageCarriesReasonUsageAndTiming) {
  Start();
  SchedulerEvent started;
  now_ += std::chrono::milliseconds(5);
  live_->OnEvent(now_, started);
  now_ += std::chrono::milliseconds(7);
  Feed("ab");
  now_ += std::chrono::milliseconds(9);
  End(EndReason::kLength);
  EXPECT_TRUE(live_->done());
  const v1::StreamGenerateResponse answer = sink_.Answer(0);
  EXPECT_EQ(answer.text(), "ab");
  EXPECT_THAT(answer.token_ids(), ElementsAre(IdOf('a'), IdOf('b')));
  EXPECT_EQ(answer.usage().prompt_tokens(), 2u);
  EXPECT_EQ(answer.usage().completion_tokens(), 2u);
  EXPECT_EQ(answer.timing().queue_us(), 5000u);
  EXPECT_EQ(answer.timing().prefill_us(), 7000u);
  EXPECT_EQ(answer.timing().time_to_first_token_us(), 12000u);
  EXPECT_EQ(answer.timing().decode_us(), 9000u);
  EXPECT_EQ(sink_.messages.back().finish_reason(), v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(sink_.messages.front().finish_reason(), v1::FINISH_REASON_UNSPECIFIED);
  EXPECT_THAT(sink_.ends, ElementsAre(absl::OkStatus()));
}

TEST_F(LiveRequestTest, StopStringAcrossTokensEndsTheAnswer) {
  request_.output.stop = {"cd"};
  Start();
  EXPECT_TRUE(Feed("abcd"));
  EXPECT_TRUE(live_->done());
  const v1::StreamGenerateResponse answer = sink_.Answer(0);
  EXPECT_EQ(answer.text(), "ab");
  EXPECT_THAT(answer.token_ids(), SizeIs(4));
  EXPECT_EQ(answer.finish_reason(), v1::FINISH_REASON_STOP);
  EXPECT_EQ(answer.matched_stop().text(), "cd");
}

TEST_F(LiveRequestTest, TokensPastAStopStringAreDropped) {
  request_.spec.n = 2;
  request_.output.stop = {"b"};
  Start();
  EXPECT_TRUE(Feed("ab", 0));
  Feed("x", 0);
  End(EndReason::kLength, 0);
  EXPECT_FALSE(live_->done()) << "the other answer goes on";
  Feed("z", 1);
  End(EndReason::kLength, 1);
  EXPECT_THAT(sink_.Answer(0).token_ids(), SizeIs(2));
  EXPECT_EQ(sink_.Answer(1).text(), "z");
  EXPECT_THAT(sink_.ends, SizeIs(1));
}

TEST_F(LiveRequestTest, HeldBackTextComesWithTheEnd) {
  request_.output.stop = {"bcd"};
  Start();
  Feed("abc");
  EXPECT_EQ(sink_.Answer(0).text(), "a");
  End(EndReason::kLength);
  EXPECT_EQ(sink_.Answer(0).text(), "abc");
}

TEST_F(LiveRequestTest, IncludesTheStopStringWhenAsked) {
  request_.output.stop = {"bc"};
  request_.output.include_stop = true;
  Start();
  EXPECT_TRUE(Feed("abc"));
  EXPECT_EQ(sink_.Answer(0).text(), "abc");
}

TEST_F(LiveRequestTest, StopStringsDoNotCountBeforeMinTokens) {
  request_.output.stop = {"b"};
  request_.output.min_tokens = 3;
  Start();
  EXPECT_FALSE(Feed("abb"));
  EXPECT_TRUE(Feed("b"));
  EXPECT_EQ(sink_.Answer(0).text(), "abb");
}

TEST_F(LiveRequestTest, EndTokenIsCountedButNotShown) {
  request_.output.skip_special_tokens = false;
  Start();
  Feed("a");
  SchedulerEvent event;
  event.kind = SchedulerEvent::Kind::kToken;
  event.token.set_token_id(2);
  event.token.set_token_index(1);
  event.ends_text = true;
  live_->OnEvent(now_, event);
  End(EndReason::kStop);
  const v1::StreamGenerateResponse answer = sink_.Answer(0);
  EXPECT_EQ(answer.text(), "a");
  EXPECT_THAT(answer.token_ids(), ElementsAre(IdOf('a'), 2u));
  EXPECT_EQ(answer.matched_stop().token_id(), 2u);
  EXPECT_EQ(answer.usage().completion_tokens(), 2u);
}

TEST_F(LiveRequestTest, EchoComesFirst) {
  request_.output.echo_text = "!\"";
  request_.output.echo_ids = {3, 4};
  Start();
  Feed("ab");
  EXPECT_EQ(sink_.messages[0].text(), "!\"a");
  EXPECT_THAT(sink_.messages[0].prompt_token_ids(), ElementsAre(3u, 4u));
  EXPECT_THAT(sink_.messages[1].prompt_token_ids(), IsEmpty());
}

TEST_F(LiveRequestTest, LogprobsComeWithEachTokenAndThePromptsFirst) {
  request_.output.num_logprobs = 1;
  Start();
  SchedulerEvent scores;
  scores.kind = SchedulerEvent::Kind::kPromptScores;
  scores.scores.add_tokens()->set_token_id(4);
  scores.scores.mutable_tokens(0)->set_logprob(-2.0f);
  live_->OnEvent(now_, scores);
  EXPECT_THAT(sink_.messages, IsEmpty()) << "nothing is sent before the first token";
  Feed("ab");
  ASSERT_THAT(sink_.messages[0].prompt_logprobs(), SizeIs(1));
  EXPECT_EQ(sink_.messages[0].prompt_logprobs(0).chosen().logprob(), -2.0f);
  ASSERT_THAT(sink_.messages[1].logprobs(), SizeIs(1));
  EXPECT_EQ(sink_.messages[1].logprobs(0).chosen().token(), "b");
}

TEST_F(LiveRequestTest, SplitCharactersComeWhole) {
  Start();
  const auto ids = model_->tokenizer->Encode("\U0001F469", /*add_special_tokens=*/false);
  ASSERT_TRUE(ids.ok());
  uint32_t index = 0;
  for (const uint32_t id : *ids) {
    SchedulerEvent event;
    event.kind = SchedulerEvent::Kind::kToken;
    event.token.set_token_id(id);
    event.token.set_token_index(index++);
    live_->OnEvent(now_, event);
    EXPECT_TRUE(sink_.messages.back().text().empty() ||
                sink_.messages.back().text() == "\U0001F469");
  }
  End(EndReason::kLength);
  EXPECT_EQ(sink_.Answer(0).text(), "\U0001F469");
}

TEST_F(LiveRequestTest, FailureTellsHowManyTokensWereSent) {
  Start();
  Feed("abc");
  absl::Status status = absl::UnavailableError("lost");
  rpc::AttachErrorInfo("WORKER_LOST", {}, &status);
  SchedulerEvent event;
  event.kind = SchedulerEvent::Kind::kFailed;
  event.status = status;
  live_->OnEvent(now_, event);
  ASSERT_THAT(sink_.ends, SizeIs(1));
  const auto info = rpc::GetDetail<google::rpc::ErrorInfo>(sink_.ends[0]);
  ASSERT_TRUE(info.has_value());
  EXPECT_EQ(info->reason(), "WORKER_LOST");
  EXPECT_EQ(info->metadata().at("tokens_sent"), "3");
  live_->Fail(status);
  EXPECT_THAT(sink_.ends, SizeIs(1));
}

TEST(MergeMessageTest, LosesNothing) {
  v1::StreamGenerateResponse first, second;
  first.set_index(1);
  first.set_token_index(3);
  first.set_text("a");
  first.add_token_ids(7);
  first.add_logprobs();
  second.set_index(1);
  second.set_token_index(4);
  second.set_text("b");
  second.add_token_ids(8);
  second.add_logprobs();
  second.set_finish_reason(v1::FINISH_REASON_STOP);
  second.mutable_usage()->set_completion_tokens(5);
  second.mutable_matched_stop()->set_text("x");
  MergeMessage(std::move(second), &first);
  EXPECT_EQ(first.token_index(), 3u);
  EXPECT_EQ(first.text(), "ab");
  EXPECT_THAT(first.token_ids(), ElementsAre(7u, 8u));
  EXPECT_THAT(first.logprobs(), SizeIs(2));
  EXPECT_EQ(first.finish_reason(), v1::FINISH_REASON_STOP);
  EXPECT_EQ(first.usage().completion_tokens(), 5u);
  EXPECT_EQ(first.matched_stop().text(), "x");
}

}  // namespace
}  // namespace sluice::controller
