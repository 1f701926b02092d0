// The service as a client sees it: real processes, real sockets, checkpoints that the real
// libraries wrote.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <thread>

#include "tests/e2e/cluster.h"

namespace sluice::e2e {
namespace {

using ::testing::ElementsAreArray;

class FormatTest : public ::testing::TestWithParam<std::string> {};

TEST_P(FormatTest, TwoWorkersGiveTheGreedyIdsOfTheLibrary) {
  Cluster cluster({.model = CheckpointPath(GetParam()), .workers = 2});
  ASSERT_TRUE(cluster.WaitReady()) << cluster.Logs();
  const Golden run = LongestClearRun(ReadGolden(GetParam()));
  ASSERT_GE(run.greedy.size(), 10u) << "the golden says too little";
  const Answer answer =
      cluster.Stream(GreedyRequest(run.prompt, static_cast<uint32_t>(run.greedy.size())));
  ASSERT_TRUE(answer.status.ok()) << answer.status.error_message() << cluster.Logs();
  EXPECT_TRUE(answer.dense);
  EXPECT_THAT(answer.ids, ElementsAreArray(run.greedy));
  EXPECT_EQ(answer.finish_reason, v1::FINISH_REASON_LENGTH);
}

INSTANTIATE_TEST_SUITE_P(Checkpoints, FormatTest,
                         ::testing::Values("llama-fp16", "llama-nf4-nested",
                                           "llama-gptq-v1-g32-asym-act", "llama-awq-g32",
                                           "opt-fp16", "opt-gptq-v1-g32-act"),
                         [](const auto& info) {
                           std::string name = info.param;
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

v1::StreamGenerateRequest SampledRequest(const Golden& golden, int64_t seed) {
  v1::StreamGenerateRequest request = GreedyRequest(golden.prompt, 24);
  request.set_temperature(0.9f);
  request.set_top_p(0.95f);
  request.set_seed(seed);
  request.set_logprobs(1);
  return request;
}

TEST(PipelineTest, OneAndTwoWorkersOverEitherTransportAreEqualBitForBit) {
  const Golden golden = ReadGolden("llama-gptq-v1-g128");
  std::vector<Answer> answers;
  for (const auto& [workers, unix_sockets] : {std::pair(1, true), {2, true}, {2, false}}) {
    Cluster cluster({.model = CheckpointPath("llama-gptq-v1-g128"),
                     .workers = workers,
                     .unix_sockets = unix_sockets});
    ASSERT_TRUE(cluster.WaitReady()) << cluster.Logs();
    answers.push_back(cluster.Stream(SampledRequest(golden, 7)));
    ASSERT_TRUE(answers.back().status.ok()) << answers.back().status.error_message();
    ASSERT_EQ(answers.back().ids.size(), 24u);
  }
  for (size_t i = 1; i < answers.size(); ++i) {
    EXPECT_EQ(answers[i].ids, answers[0].ids);
    EXPECT_EQ(answers[i].logprobs, answers[0].logprobs);  // Bit for bit: no tolerance
  }
}

class ServiceTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    cluster_ = new Cluster({.model = CheckpointPath("llama-fp16"),
                            .workers = 2,
                            .controller_flags = {"--max-batch-size", "8", "--max-queue", "16"}});
    ASSERT_TRUE(cluster_->WaitReady()) << cluster_->Logs();
  }
  static void TearDownTestSuite() {
    delete cluster_;
    cluster_ = nullptr;
  }
  static Cluster* cluster_;
  const Golden golden_ = ReadGolden("llama-fp16");

  uint32_t UsedBlocks() {
    grpc::ClientContext context;
    v1::GetClusterResponse response;
    EXPECT_TRUE(cluster_->Admin()->GetCluster(&context, {}, &response).ok());
    return response.scheduler().used_blocks();
  }
  // All blocks come back soon after the last request has ended.
  void ExpectNoBlockLeaks() {
    for (int i = 0; i < 500 && UsedBlocks() != 0; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    EXPECT_EQ(UsedBlocks(), 0u);
  }
};
Cluster* ServiceTest::cluster_ = nullptr;

TEST_F(ServiceTest, SameSeedSameAnswerWhateverTheBatchMates) {
  const Answer alone = cluster_->Stream(SampledRequest(golden_, 42));
  ASSERT_TRUE(alone.status.ok()) << alone.status.error_message();
  std::atomic<bool> stop = false;
  std::vector<std::thread> mates;
  for (int i = 0; i < 5; ++i) {
    mates.emplace_back([&, i] {
      for (int64_t seed = i * 1000; !stop; ++seed) cluster_->Stream(SampledRequest(golden_, seed));
    });
  }
  for (int i = 0; i < 6; ++i) {
    const Answer crowded = cluster_->Stream(SampledRequest(golden_, 42));
    ASSERT_TRUE(crowded.status.ok()) << crowded.status.error_message();
    EXPECT_EQ(crowded.ids, alone.ids);
    EXPECT_EQ(crowded.logprobs, alone.logprobs);
  }
  stop = true;
  for (std::thread& mate : mates) mate.join();
  ExpectNoBlockLeaks();
}

TEST_F(ServiceTest, ChoicesOfOneRequestDiffer) {
  v1::GenerateRequest request;
  request.mutable_token_ids()->mutable_ids()->Assign(golden_.prompt.begin(), golden_.prompt.end());
  request.set_max_tokens(16);
  request.set_seed(3);
  request.set_n(4);
  request.set_ignore_eos(true);
  grpc::ClientContext context;
  v1::GenerateResponse response;
  const grpc::Status status = cluster_->Generation()->Generate(&context, request, &response);
  ASSERT_TRUE(status.ok()) << status.error_message();
  ASSERT_EQ(response.choices_size(), 4);
  std::set<std::vector<uint32_t>> answers;
  for (const auto& choice : response.choices()) {
    EXPECT_EQ(choice.token_ids_size(), 16);
    answers.insert({choice.token_ids().begin(), choice.token_ids().end()});
  }
  EXPECT_EQ(answers.size(), 4u);
}

TEST_F(ServiceTest, CancellingAtEveryTokenLeavesNothingBehind) {
  for (int reads = 0; reads < 20; ++reads) {
    auto stub = cluster_->Generation();
    grpc::ClientContext context;
    auto reader = stub->StreamGenerate(&context, GreedyRequest(golden_.prompt, 200));
    v1::StreamGenerateResponse message;
    for (int i = 0; i < reads; ++i) ASSERT_TRUE(reader->Read(&message));
    context.TryCancel();
    EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
  }
  ExpectNoBlockLeaks();
}

TEST_F(ServiceTest, AFullQueueIsRefusedAtOnceAndTheRestIsServed) {
  std::atomic<int> ok = 0, refused = 0, other = 0;
  std::vector<std::thread> clients;
  for (int i = 0; i < 64; ++i) {
    clients.emplace_back([&] {
      const Answer answer = cluster_->Stream(GreedyRequest(golden_.prompt, 200));
      if (answer.status.ok()) {
        ++ok;
      } else if (answer.status.error_code() == grpc::StatusCode::RESOURCE_EXHAUSTED &&
                 answer.status.error_details().find("RetryInfo") != std::string::npos) {
        ++refused;
      } else {
        ++other;
        ADD_FAILURE() << answer.status.error_message();
      }
    });
  }
  for (std::thread& client : clients) client.join();
  EXPECT_EQ(other, 0);
  EXPECT_GE(ok, 16);
  EXPECT_GT(refused, 0);
  ExpectNoBlockLeaks();
}

TEST_F(ServiceTest, DeadlineEndsTheRequestAndFreesItsBlocks) {
  auto stub = cluster_->Generation();
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(30));
  auto reader = stub->StreamGenerate(&context, GreedyRequest(golden_.prompt, 230));
  v1::StreamGenerateResponse message;
  while (reader->Read(&message)) {
  }
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  ExpectNoBlockLeaks();
}

}  // namespace
}  // namespace sluice::e2e
