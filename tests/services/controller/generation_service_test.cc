// The public API over real gRPC, with a pipeline that is none: what a client sees when things go
// well, and when they do not.
#include <gmock/gmock.h>
#include <grpcpp/client_context.h>
#include <gtest/gtest.h>

#include "services/rpc/error_details.h"
#include "services/rpc/grpc_status.h"
#include "tests/services/controller/fake_cluster.h"

namespace sluice::controller {
namespace {

using std::chrono::milliseconds;
using testing::IsEmpty;
using testing::SizeIs;

// Greedy, does not end by itself.
template <typename Request>
Request Greedy(const std::vector<uint32_t>& prompt, uint32_t max_tokens) {
  Request request;
  request.mutable_token_ids()->mutable_ids()->Add(prompt.begin(), prompt.end());
  request.set_max_tokens(max_tokens);
  request.set_temperature(0);
  request.set_ignore_eos(true);
  return request;
}

std::vector<uint32_t> Expected(std::vector<uint32_t> history, uint32_t count, uint32_t choice) {
  std::vector<uint32_t> tokens;
  for (uint32_t i = 0; i < count; ++i) {
    tokens.push_back(FakeStage::NextToken(history, choice));
    history.push_back(tokens.back());
  }
  return tokens;
}

class GenerationServiceTest : public testing::Test {
 protected:
  ~GenerationServiceTest() override { EXPECT_THAT(cluster_.pipeline.errors(), IsEmpty()); }

  FakeCluster cluster_;
};

TEST_F(GenerationServiceTest, RefusesBeforeItServes) {
  grpc::ClientContext context;
  v1::GenerateResponse response;
  const grpc::Status status =
      cluster_.generation->Generate(&context, Greedy<v1::GenerateRequest>({5}, 4), &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE);
  const absl::Status details = rpc::FromGrpcStatus(status);
  EXPECT_EQ(rpc::GetDetail<google::rpc::ErrorInfo>(details)->reason(), "NOT_SERVING");
  EXPECT_TRUE(rpc::GetDetail<google::rpc::RetryInfo>(details).has_value());
  EXPECT_EQ(context.GetServerTrailingMetadata().count("grpc-retry-pushback-ms"), 1u);
}

TEST_F(GenerationServiceTest, StreamsDenseTokensThenReasonAndUsage) {
  cluster_.AttachWorker();
  grpc::ClientContext context;
  auto stream = cluster_.generation->StreamGenerate(
      &context, Greedy<v1::StreamGenerateRequest>({5, 6, 7}, 40));
  v1::StreamGenerateResponse message;
  std::vector<uint32_t> ids;
  std::string text;
  v1::StreamGenerateResponse last;
  while (stream->Read(&message)) {
    EXPECT_FALSE(last.has_usage()) << "a message after the last one";
    EXPECT_EQ(message.token_index(), ids.size());
    EXPECT_FALSE(message.request_id().empty());
    ids.insert(ids.end(), message.token_ids().begin(), message.token_ids().end());
    text += message.text();
    last = message;
  }
  const grpc::Status status = stream->Finish();
  EXPECT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(ids, Expected({5, 6, 7}, 40, 0));
  EXPECT_EQ(text, TextOf(ids));
  EXPECT_EQ(last.finish_reason(), v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(last.usage().prompt_tokens(), 3u);
  EXPECT_EQ(last.usage().completion_tokens(), 40u);
}

TEST_F(GenerationServiceTest, AnswersWholeWithEveryChoice) {
  cluster_.AttachWorker();
  v1::GenerateRequest request = Greedy<v1::GenerateRequest>({9, 8}, 6);
  request.set_n(3);
  request.set_request_id("mine");
  grpc::ClientContext context;
  v1::GenerateResponse response;
  ASSERT_TRUE(cluster_.generation->Generate(&context, request, &response).ok());
  EXPECT_EQ(response.request_id(), "mine");
  EXPECT_EQ(response.model(), "tiny");
  ASSERT_THAT(response.choices(), SizeIs(3));
  for (uint32_t i = 0; i < 3; ++i) {
    const v1::Choice& choice = response.choices(static_cast<int>(i));
    EXPECT_EQ(choice.index(), i);
    EXPECT_THAT(choice.token_ids(), testing::ElementsAreArray(Expected({9, 8}, 6, i)));
    EXPECT_EQ(choice.finish_reason(), v1::FINISH_REASON_LENGTH);
  }
  EXPECT_EQ(response.usage().completion_tokens(), 18u);
}

TEST_F(GenerationServiceTest, StopStringEndsTheStream) {
  cluster_.AttachWorker();
  const std::string whole = TextOf(Expected({5, 6, 7}, 40, 0));
  v1::GenerateRequest request = Greedy<v1::GenerateRequest>({5, 6, 7}, 40);
  request.add_stop(whole.substr(10, 3));
  grpc::ClientContext context;
  v1::GenerateResponse response;
  ASSERT_TRUE(cluster_.generation->Generate(&context, request, &response).ok());
  const v1::Choice& choice = response.choices(0);
  EXPECT_EQ(choice.text(), whole.substr(0, whole.find(whole.substr(10, 3))));
  EXPECT_EQ(choice.finish_reason(), v1::FINISH_REASON_STOP);
  EXPECT_EQ(choice.matched_stop().text(), whole.substr(10, 3));
  cluster_.WaitIdle();
}

TEST_F(GenerationServiceTest, BadFieldsComeAsViolations) {
  cluster_.AttachWorker();
  v1::StreamGenerateRequest request = Greedy<v1::StreamGenerateRequest>({5}, 4);
  request.set_top_p(-1);
  request.set_n(100);
  grpc::ClientContext context;
  auto stream = cluster_.generation->StreamGenerate(&context, request);
  v1::StreamGenerateResponse message;
  EXPECT_FALSE(stream->Read(&message));
  const absl::Status status = rpc::FromGrpcStatus(stream->Finish());
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  const auto bad = rpc::GetDetail<google::rpc::BadRequest>(status);
  ASSERT_TRUE(bad.has_value());
  EXPECT_THAT(bad->field_violations(), SizeIs(2));
}

TEST_F(GenerationServiceTest, DeadlineEndsTheRequestAndFreesItsBlocks) {
  cluster_.AttachWorker();
  cluster_.pipeline.Hold();
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + milliseconds(100));
  v1::GenerateResponse response;
  const grpc::Status status =
      cluster_.generation->Generate(&context, Greedy<v1::GenerateRequest>({5}, 100), &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  cluster_.pipeline.Release();
  cluster_.WaitIdle();
}

TEST_F(GenerationServiceTest, CancelledStreamFreesItsBlocksAndOthersGoOn) {
  cluster_.AttachWorker();
  cluster_.pipeline.Hold();
  grpc::ClientContext other_context;
  auto other = cluster_.generation->StreamGenerate(&other_context,
                                                   Greedy<v1::StreamGenerateRequest>({6}, 60));
  auto context = std::make_unique<grpc::ClientContext>();
  auto stream = cluster_.generation->StreamGenerate(context.get(),
                                                    Greedy<v1::StreamGenerateRequest>({5}, 2000));
  cluster_.WaitForCluster([](const v1::GetClusterResponse& cluster) {
    return cluster.scheduler().running_sequences() == 2;
  });
  cluster_.pipeline.Release(10);
  v1::StreamGenerateResponse message;
  ASSERT_TRUE(stream->Read(&message));
  context->TryCancel();
  while (stream->Read(&message)) {
  }
  EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::CANCELLED);
  cluster_.WaitForCluster([](const v1::GetClusterResponse& cluster) {
    return cluster.scheduler().cancelled_requests() == 1;
  });
  cluster_.pipeline.Release();
  uint32_t tokens = 0;
  while (other->Read(&message)) {
    tokens += static_cast<uint32_t>(message.token_ids_size());
  }
  EXPECT_TRUE(other->Finish().ok());
  EXPECT_EQ(tokens, 60u);
  cluster_.WaitIdle();
}

TEST_F(GenerationServiceTest, CancelRequestEndsTheCallWithWhatThereIs) {
  cluster_.AttachWorker();
  cluster_.pipeline.Release(5);
  v1::StreamGenerateRequest request = Greedy<v1::StreamGenerateRequest>({5}, 2000);
  request.set_request_id("long-one");
  grpc::ClientContext context;
  auto stream = cluster_.generation->StreamGenerate(&context, request);
  v1::StreamGenerateResponse message;
  ASSERT_TRUE(stream->Read(&message));

  v1::CancelRequestRequest cancel;
  v1::CancelRequestResponse cancelled;
  cancel.set_request_id("another");
  grpc::ClientContext wrong;
  EXPECT_EQ(cluster_.generation->CancelRequest(&wrong, cancel, &cancelled).error_code(),
            grpc::StatusCode::NOT_FOUND);
  cancel.set_request_id("long-one");
  grpc::ClientContext right;
  EXPECT_TRUE(cluster_.generation->CancelRequest(&right, cancel, &cancelled).ok());
  v1::StreamGenerateResponse last = message;
  while (stream->Read(&message)) {
    last = message;
  }
  EXPECT_TRUE(stream->Finish().ok());
  EXPECT_EQ(last.finish_reason(), v1::FINISH_REASON_CANCELLED);
  EXPECT_TRUE(last.has_usage());
}

TEST_F(GenerationServiceTest, RefusesASecondLiveRequestOfOneId) {
  cluster_.AttachWorker();
  cluster_.pipeline.Release(1);
  v1::StreamGenerateRequest request = Greedy<v1::StreamGenerateRequest>({5}, 20);
  request.set_request_id("same");
  grpc::ClientContext first_context, second_context;
  auto first = cluster_.generation->StreamGenerate(&first_context, request);
  v1::StreamGenerateResponse message;
  ASSERT_TRUE(first->Read(&message));
  auto second = cluster_.generation->StreamGenerate(&second_context, request);
  EXPECT_FALSE(second->Read(&message));
  EXPECT_EQ(second->Finish().error_code(), grpc::StatusCode::ALREADY_EXISTS);
  cluster_.pipeline.Release();
  while (first->Read(&message)) {
  }
  EXPECT_TRUE(first->Finish().ok());
}

// A retry policy may send a call again only while no headers have come.
TEST_F(GenerationServiceTest, SendsNothingBeforeTheFirstToken) {
  cluster_.AttachWorker();
  cluster_.pipeline.Hold();
  grpc::ClientContext context;
  grpc::CompletionQueue queue;
  auto stream = cluster_.generation->PrepareAsyncStreamGenerate(
      &context, Greedy<v1::StreamGenerateRequest>({5}, 3), &queue);
  int started, headers;
  void* tag = nullptr;
  bool ok = false;
  stream->StartCall(&started);
  ASSERT_TRUE(queue.Next(&tag, &ok) && ok && tag == &started);
  stream->ReadInitialMetadata(&headers);
  cluster_.WaitForCluster([](const v1::GetClusterResponse& cluster) {
    return cluster.scheduler().running_sequences() == 1 && cluster.scheduler().steps() >= 1;
  });
  EXPECT_EQ(queue.AsyncNext(&tag, &ok, std::chrono::system_clock::now() + milliseconds(20)),
            grpc::CompletionQueue::TIMEOUT);
  cluster_.pipeline.Release();
  ASSERT_TRUE(queue.Next(&tag, &ok) && ok && tag == &headers);
  v1::StreamGenerateResponse message;
  do {
    stream->Read(&message, &headers);
    ASSERT_TRUE(queue.Next(&tag, &ok));
  } while (ok);
  grpc::Status status;
  stream->Finish(&status, &headers);
  ASSERT_TRUE(queue.Next(&tag, &ok));
  EXPECT_TRUE(status.ok());
}

TEST_F(GenerationServiceTest, ALostWorkerEndsStreamsAtOnceAndItsReturnServesAgain) {
  cluster_.AttachWorker();
  cluster_.pipeline.Release(4);
  grpc::ClientContext context;
  auto stream =
      cluster_.generation->StreamGenerate(&context, Greedy<v1::StreamGenerateRequest>({5}, 2000));
  v1::StreamGenerateResponse message;
  uint32_t tokens = 0;
  while (tokens < 4 && stream->Read(&message)) {
    tokens += static_cast<uint32_t>(message.token_ids_size());
  }
  cluster_.LoseWorker();
  while (stream->Read(&message)) {
  }
  const absl::Status status = rpc::FromGrpcStatus(stream->Finish());
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  const auto info = rpc::GetDetail<google::rpc::ErrorInfo>(status);
  ASSERT_TRUE(info.has_value());
  EXPECT_EQ(info->reason(), "WORKER_LOST");
  EXPECT_EQ(info->metadata().at("tokens_sent"), "4");
  EXPECT_TRUE(rpc::GetDetail<google::rpc::RetryInfo>(status).has_value());
  cluster_.WaitReady(false);
  EXPECT_EQ(cluster_.Cluster().state(), v1::MODEL_STATE_RECOVERING);

  cluster_.pipeline.Release();
  cluster_.AttachWorker();
  EXPECT_EQ(cluster_.Cluster().epoch(), 2u);
  grpc::ClientContext again;
  v1::GenerateResponse response;
  ASSERT_TRUE(
      cluster_.generation->Generate(&again, Greedy<v1::GenerateRequest>({5}, 4), &response).ok());
  EXPECT_THAT(response.choices(0).token_ids(), testing::ElementsAreArray(Expected({5}, 4, 0)));
}

TEST_F(GenerationServiceTest, AFullQueueRefusesWithRetryInfo) {
  cluster_.AttachWorker();
  cluster_.pipeline.Hold();
  std::vector<std::unique_ptr<grpc::ClientContext>> contexts;
  std::vector<std::unique_ptr<grpc::ClientReader<v1::StreamGenerateResponse>>> streams;
  const auto open = [&](uint32_t id) {
    contexts.push_back(std::make_unique<grpc::ClientContext>());
    streams.push_back(cluster_.generation->StreamGenerate(
        contexts.back().get(), Greedy<v1::StreamGenerateRequest>({id}, 4)));
  };
  for (uint32_t i = 0; i < 6; ++i) {  // 4 run, 2 wait
    open(5 + i);
  }
  cluster_.WaitForCluster([](const v1::GetClusterResponse& cluster) {
    return cluster.scheduler().queued_requests() == 2;
  });
  open(20);
  v1::StreamGenerateResponse message;
  EXPECT_FALSE(streams.back()->Read(&message));
  const absl::Status status = rpc::FromGrpcStatus(streams.back()->Finish());
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(rpc::GetDetail<google::rpc::RetryInfo>(status).has_value());
  EXPECT_TRUE(rpc::GetDetail<google::rpc::QuotaFailure>(status).has_value());
  EXPECT_EQ(contexts.back()->GetServerTrailingMetadata().count("grpc-retry-pushback-ms"), 1u);
  cluster_.pipeline.Release();
  for (size_t i = 0; i < 6; ++i) {
    while (streams[i]->Read(&message)) {
    }
    EXPECT_TRUE(streams[i]->Finish().ok());
  }
}

TEST_F(GenerationServiceTest, DrainWaitsThenRefuses) {
  cluster_.AttachWorker();
  cluster_.pipeline.Release(2);
  grpc::ClientContext context;
  auto stream =
      cluster_.generation->StreamGenerate(&context, Greedy<v1::StreamGenerateRequest>({5}, 30));
  v1::StreamGenerateResponse message;
  ASSERT_TRUE(stream->Read(&message));
  std::thread drain([this] {
    grpc::ClientContext drain_context;
    v1::DrainResponse response;
    EXPECT_TRUE(cluster_.admin->Drain(&drain_context, {}, &response).ok());
    EXPECT_EQ(response.ended_requests(), 0u);
  });
  cluster_.WaitReady(false);
  grpc::ClientContext late;
  v1::GenerateResponse refused;
  const grpc::Status status =
      cluster_.generation->Generate(&late, Greedy<v1::GenerateRequest>({5}, 4), &refused);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(rpc::GetDetail<google::rpc::ErrorInfo>(rpc::FromGrpcStatus(status))->reason(),
            "DRAINING");
  cluster_.pipeline.Release();
  while (stream->Read(&message)) {
  }
  EXPECT_TRUE(stream->Finish().ok()) << "the live request was let finish";
  drain.join();
}

TEST_F(GenerationServiceTest, TokenizeAndDetokenizeAreInverse) {
  v1::TokenizeRequest request;
  request.set_text("Hello, wörld");
  request.set_add_special_tokens(false);
  v1::TokenizeResponse tokens;
  grpc::ClientContext first, second, third;
  ASSERT_TRUE(cluster_.generation->Tokenize(&first, request, &tokens).ok());
  EXPECT_EQ(tokens.tokens_size(), tokens.token_ids_size());
  v1::DetokenizeRequest back;
  *back.mutable_token_ids() = tokens.token_ids();
  v1::DetokenizeResponse text;
  ASSERT_TRUE(cluster_.generation->Detokenize(&second, back, &text).ok());
  EXPECT_EQ(text.text(), "Hello, wörld");
  back.add_token_ids(4000000000u);
  EXPECT_EQ(cluster_.generation->Detokenize(&third, back, &text).error_code(),
            grpc::StatusCode::INVALID_ARGUMENT);
}

TEST_F(GenerationServiceTest, DescribesTheModelAndItsMap) {
  cluster_.AttachWorker();
  grpc::ClientContext first, second, third, fourth;
  v1::ListModelsResponse list;
  ASSERT_TRUE(cluster_.models->ListModels(&first, {}, &list).ok());
  ASSERT_THAT(list.models(), SizeIs(1));
  EXPECT_EQ(list.models(0).name(), "tiny");
  EXPECT_EQ(list.models(0).state(), v1::MODEL_STATE_SERVING);
  v1::GetModelRequest other;
  other.set_name("other");
  v1::GetModelResponse model;
  EXPECT_EQ(cluster_.models->GetModel(&second, other, &model).error_code(),
            grpc::StatusCode::NOT_FOUND);
  v1::PlanDeviceMapRequest what_if;
  (*what_if.mutable_max_memory())["0"] = 128 << 20;
  (*what_if.mutable_max_memory())["1"] = 128 << 20;
  v1::PlanDeviceMapResponse planned;
  const grpc::Status status = cluster_.models->PlanDeviceMap(&third, what_if, &planned);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_THAT(planned.device_map().stages(), SizeIs(2));
  EXPECT_FALSE(planned.text().empty());
  v1::GetDeviceMapResponse live;
  ASSERT_TRUE(cluster_.admin->GetDeviceMap(&fourth, {}, &live).ok());
  ASSERT_THAT(live.device_map().stages(), SizeIs(1));
  EXPECT_EQ(live.device_map().stages(0).worker_id(), "w0");
  EXPECT_EQ(live.device_map().epoch(), 1u);
}

}  // namespace
}  // namespace sluice::controller
