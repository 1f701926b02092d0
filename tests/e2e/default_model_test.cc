// The default model, SmolLM2-135M-Instruct Q4_1: real weights and real text. ./dev test fetches it
// and names it in SLUICE_MODEL.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>

#include "tests/e2e/cluster.h"

namespace sluice::e2e {
namespace {

// What transformers answers, greedy, in float32 and in float16 alike.
const std::vector<uint32_t> kPrompt = {504, 3575, 282, 4649, 314};  // "The capital of France is"
const std::vector<uint32_t> kAnswer = {7042, 30, 198, 198, 504, 2988, 314, 42,  216, 34, 32, 33,
                                       40,   29, 32,  33,  29,  34,   34,  216, 33,  34, 42, 33};

class DefaultModelTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const char* path = std::getenv("SLUICE_MODEL");
    ASSERT_NE(path, nullptr)
        << "run the tests with ./dev test, which fetches the model and sets SLUICE_MODEL";
    model_ = path;
  }
  std::string model_;
};

TEST_F(DefaultModelTest, GreedyIdsOfTransformersWithOneTwoAndThreeWorkers) {
  std::vector<std::vector<float>> logprobs;
  for (int workers : {1, 2, 3}) {
    Cluster cluster({.model = model_, .workers = workers});
    ASSERT_TRUE(cluster.WaitReady()) << cluster.Logs();
    auto request = GreedyRequest({}, kAnswer.size());
    request.set_text("The capital of France is");
    request.set_logprobs(0);
    const Answer answer = cluster.Stream(request);
    ASSERT_TRUE(answer.status.ok()) << answer.status.error_message() << cluster.Logs();
    EXPECT_THAT(answer.ids, ::testing::ElementsAreArray(kAnswer)) << workers << " workers";
    EXPECT_EQ(answer.text, " Paris.\n\nThe answer is: 2018-01-22 12:1");
    logprobs.push_back(answer.logprobs);
  }
  EXPECT_EQ(logprobs[0], logprobs[1]);  // Bit for bit
  EXPECT_EQ(logprobs[0], logprobs[2]);
}

TEST_F(DefaultModelTest, ChatTokenizeAndDetokenize) {
  Cluster cluster({.model = model_, .workers = 2});
  ASSERT_TRUE(cluster.WaitReady()) << cluster.Logs();
  v1::StreamGenerateRequest chat;
  auto* message = chat.mutable_chat_messages()->add_messages();
  message->set_role("user");
  message->set_content("What is the capital of France?");
  chat.set_temperature(0);
  chat.set_max_tokens(32);
  const Answer answer = cluster.Stream(chat);
  ASSERT_TRUE(answer.status.ok()) << answer.status.error_message();
  EXPECT_EQ(answer.text, "The capital of France is Paris.");
  EXPECT_EQ(answer.finish_reason, v1::FINISH_REASON_STOP);

  auto stub = cluster.Generation();
  grpc::ClientContext tokenize_context;
  v1::TokenizeRequest tokenize;
  tokenize.set_text("The capital of France is");
  v1::TokenizeResponse tokens;
  ASSERT_TRUE(stub->Tokenize(&tokenize_context, tokenize, &tokens).ok());
  EXPECT_THAT(tokens.token_ids(), ::testing::ElementsAreArray(kPrompt));
  grpc::ClientContext detokenize_context;
  v1::DetokenizeRequest detokenize;
  *detokenize.mutable_token_ids() = tokens.token_ids();
  v1::DetokenizeResponse text;
  ASSERT_TRUE(stub->Detokenize(&detokenize_context, detokenize, &text).ok());
  EXPECT_EQ(text.text(), "The capital of France is");
}

TEST_F(DefaultModelTest, StopStringsAndPromptLogprobs) {
  Cluster cluster({.model = model_, .workers = 2});
  ASSERT_TRUE(cluster.WaitReady()) << cluster.Logs();
  v1::GenerateRequest request;
  request.set_text("The capital of France is");
  request.set_temperature(0);
  request.set_max_tokens(24);
  request.add_stop("answer is");  // Crosses a token border
  request.set_prompt_logprobs(1);
  grpc::ClientContext context;
  v1::GenerateResponse response;
  const grpc::Status status = cluster.Generation()->Generate(&context, request, &response);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(response.choices(0).text(), " Paris.\n\nThe ");
  EXPECT_EQ(response.choices(0).finish_reason(), v1::FINISH_REASON_STOP);
  EXPECT_EQ(response.choices(0).matched_stop().text(), "answer is");
  EXPECT_EQ(response.usage().prompt_tokens(), 5u);
  EXPECT_GE(response.prompt_logprobs_size(), 4);
}

// transformers 5.24 in float32 on the same file and windows gives 32.334727 (tests/testdata/README).
TEST_F(DefaultModelTest, EvalGivesThePerplexityOfTransformers) {
  Cluster cluster({.model = model_, .workers = 2});
  ASSERT_TRUE(cluster.WaitReady()) << cluster.Logs();
  const std::string log = testing::TempDir() + "eval-" + std::to_string(getpid()) + ".log";
  Process eval(
      {std::string(SLUICE_BIN) + "/sluice", "eval", "--address", cluster.public_address(), "--file",
       SLUICE_TESTDATA "/text/perplexity.txt", "--window", "256", "--stride", "64", "--json"},
      log);
  ASSERT_EQ(eval.Wait(120), 0) << log;
  std::ifstream file(log);
  const std::string output{std::istreambuf_iterator<char>(file), {}};
  const nlohmann::json result =
      nlohmann::json::parse(output.substr(std::min(output.find('{'), output.size())), nullptr,
                            /*allow_exceptions=*/false);
  ASSERT_TRUE(result.is_object()) << output;
  EXPECT_EQ(result["tokens"], 750);
  EXPECT_NEAR(result["perplexity"].get<double>(), 32.334727, 1e-3);
  std::filesystem::remove(log);
}

}  // namespace
}  // namespace sluice::e2e
