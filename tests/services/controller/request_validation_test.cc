#include "services/controller/request_validation.h"

#include <gmock/gmock.h>
#include <google/protobuf/util/json_util.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "services/rpc/error_details.h"
#include "tests/services/controller/test_model.h"

namespace sluice::controller {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;
using testing::UnorderedElementsAre;

constexpr uint32_t kMaxModelLen = 64;

class RequestValidationTest : public testing::Test {
 protected:
  static void SetUpTestSuite() { model_ = MakeTestModel(); }
  static void TearDownTestSuite() { model_.reset(); }

  static v1::GenerateRequest Request(const std::string& json) {
    v1::GenerateRequest request;
    EXPECT_TRUE(google::protobuf::util::JsonStringToMessage(json, &request).ok()) << json;
    if (request.prompt_case() == v1::GenerateRequest::PROMPT_NOT_SET) {
      request.set_text("hello");
    }
    return request;
  }

  static std::vector<std::string> Fields(const v1::GenerateRequest& request) {
    const auto prepared = PrepareRequest(request, *model_, kMaxModelLen);
    if (prepared.ok()) {
      return {};
    }
    EXPECT_EQ(prepared.status().code(), absl::StatusCode::kInvalidArgument) << prepared.status();
    std::vector<std::string> fields;
    if (const auto bad = rpc::GetDetail<google::rpc::BadRequest>(prepared.status())) {
      for (const auto& violation : bad->field_violations()) {
        fields.push_back(violation.field());
      }
    }
    return fields;
  }

  static GenerationRequest Prepared(const v1::GenerateRequest& request) {
    auto prepared = PrepareRequest(request, *model_, kMaxModelLen);
    EXPECT_TRUE(prepared.ok()) << prepared.status();
    return prepared.ok() ? *std::move(prepared) : GenerationRequest();
  }

  static std::shared_ptr<const ServedModel> model_;
};

std::shared_ptr<const ServedModel> RequestValidationTest::model_;

// A worker refuses a step whose banned ids are outside of the vocabulary, and with it the whole
// pipeline: such an id of the tokenizer must not get there.
TEST_F(RequestValidationTest, EndIdsOfTheTokenizerAreInsideOfTheModel) {
  internal::v1::PlanShardsResponse shards = plan::SmallLlama(4, 1 << 20, 1 << 20, false);
  ASSERT_EQ(shards.config().vocab_size(), 1000U);
  text::TokenizerFiles files;
  files["tokenizer.json"] = ReadTestFile("tokenizer.json");
  files["generation_config.json"] = R"({"eos_token_id":[2,1500]})";
  const auto model = MakeServedModel(std::move(shards), files, "tiny");
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_THAT((*model)->eos_ids, ElementsAre(2));
  const auto prepared = PrepareRequest(Request(R"({"minTokens":1})"), **model, kMaxModelLen);
  ASSERT_TRUE(prepared.ok()) << prepared.status();
  EXPECT_THAT(prepared->spec.sampling.banned_until_min(), ElementsAre(2));
}

TEST_F(RequestValidationTest, DefaultsAreThoseOfOpenAiCompletions) {
  const GenerationRequest request = Prepared(Request("{}"));
  EXPECT_EQ(request.spec.max_tokens, 16u);
  EXPECT_EQ(request.spec.n, 1u);
  EXPECT_EQ(request.spec.sampling.temperature(), 1.0f);
  EXPECT_EQ(request.spec.sampling.top_p(), 1.0f);
  EXPECT_EQ(request.spec.sampling.top_k(), 0u);
  EXPECT_EQ(request.spec.sampling.repetition_penalty(), 1.0f);
  EXPECT_EQ(request.spec.sampling.num_logprobs(), -1);
  EXPECT_EQ(request.spec.sampling.num_prompt_logprobs(), -1);
  EXPECT_TRUE(request.output.skip_special_tokens);
  EXPECT_THAT(request.spec.end_ids, ElementsAre(2u));
  EXPECT_EQ(request.request_id.rfind("req-", 0), 0u);
}

TEST_F(RequestValidationTest, UnsetSeedsDiffer) {
  EXPECT_NE(Prepared(Request("{}")).spec.sampling.seed(),
            Prepared(Request("{}")).spec.sampling.seed());
  EXPECT_EQ(Prepared(Request(R"({"seed": "-5"})")).spec.sampling.seed(), static_cast<uint64_t>(-5));
}

TEST_F(RequestValidationTest, RefusesNumbersThatAreNone) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float inf = std::numeric_limits<float>::infinity();
  for (const float bad : {nan, inf, -inf, 1e38f, -1.0e-3f}) {
    v1::GenerateRequest request = Request("{}");
    request.set_temperature(bad);
    request.set_top_p(bad);
    request.set_min_p(bad);
    request.set_repetition_penalty(bad);
    EXPECT_THAT(Fields(request),
                UnorderedElementsAre("temperature", "top_p", "min_p", "repetition_penalty"))
        << bad;
  }
  for (const float bad : {nan, inf, -inf, 2.5f, -2.5f}) {
    v1::GenerateRequest request = Request("{}");
    request.set_presence_penalty(bad);
    request.set_frequency_penalty(bad);
    EXPECT_THAT(Fields(request), UnorderedElementsAre("presence_penalty", "frequency_penalty"));
  }
}

TEST_F(RequestValidationTest, SmallestNumbersHaveAMeaning) {
  v1::GenerateRequest request = Request("{}");
  request.set_temperature(-0.0f);
  EXPECT_EQ(Prepared(request).spec.sampling.temperature(), 0.0f);
  request.set_temperature(1e-38f);
  EXPECT_EQ(Prepared(request).spec.sampling.temperature(), 0.0f);
  request.set_top_k(-1);
  EXPECT_EQ(Prepared(request).spec.sampling.top_k(), 0u);
}

TEST_F(RequestValidationTest, RefusesCounts) {
  const struct {
    const char* json;
    const char* field;
  } kCases[] = {
      {R"({"max_tokens": 0})", "max_tokens"},
      {R"({"max_tokens": 2147483647})", "max_tokens"},
      {R"({"max_tokens": 4294967295})", "max_tokens"},
      {R"({"max_tokens": 4, "min_tokens": 5})", "min_tokens"},
      {R"({"n": 0})", "n"},
      {R"({"n": 9})", "n"},
      {R"({"n": 4294967295})", "n"},
      {R"({"logprobs": -1})", "logprobs"},
      {R"({"logprobs": 21})", "logprobs"},
      {R"({"prompt_logprobs": 2147483647})", "prompt_logprobs"},
      {R"({"top_k": -2})", "top_k"},
      {R"({"top_p": 0})", "top_p"},
      {R"({"stop": [""]})", "stop"},
      {R"({"stop": ["1","2","3","4","5","6","7","8","9","10","11","12","13","14","15","16","17"]})",
       "stop"},
      {R"({"stop_token_ids": [1000]})", "stop_token_ids"},
      {R"({"request_id": "with space"})", "request_id"},
      {R"({"token_ids": {"ids": []}})", "token_ids.ids"},
      {R"({"token_ids": {"ids": [1000]}})", "token_ids.ids"},
      {R"({"chat_messages": {}})", "chat_messages.messages"},
  };
  for (const auto& one : kCases) {
    EXPECT_THAT(Fields(Request(one.json)), ElementsAre(one.field)) << one.json;
  }
  v1::GenerateRequest long_stop = Request("{}");
  long_stop.add_stop(std::string(257, 'x'));
  EXPECT_THAT(Fields(long_stop), ElementsAre("stop"));
  v1::GenerateRequest no_prompt;
  EXPECT_THAT(Fields(no_prompt), ElementsAre("prompt"));
}

TEST_F(RequestValidationTest, NamesEveryBadField) {
  EXPECT_THAT(Fields(Request(R"({"n": 0, "top_k": -7, "max_tokens": 0})")),
              UnorderedElementsAre("n", "top_k", "max_tokens"));
}

TEST_F(RequestValidationTest, RefusesAnUnknownModel) {
  EXPECT_TRUE(PrepareRequest(Request(R"({"model": "tiny"})"), *model_, kMaxModelLen).ok());
  const auto prepared = PrepareRequest(Request(R"({"model": "other"})"), *model_, kMaxModelLen);
  EXPECT_EQ(prepared.status().code(), absl::StatusCode::kNotFound);
  const auto resource = rpc::GetDetail<google::rpc::ResourceInfo>(prepared.status());
  ASSERT_TRUE(resource.has_value());
  EXPECT_EQ(resource->resource_name(), "other");
}

TEST_F(RequestValidationTest, RefusesAPromptThatIsTooLong) {
  v1::GenerateRequest request;
  for (uint32_t i = 0; i < kMaxModelLen; ++i) {
    request.mutable_token_ids()->add_ids(5);
  }
  const auto prepared = PrepareRequest(request, *model_, kMaxModelLen);
  EXPECT_EQ(prepared.status().code(), absl::StatusCode::kInvalidArgument);
  const auto info = rpc::GetDetail<google::rpc::ErrorInfo>(prepared.status());
  ASSERT_TRUE(info.has_value());
  EXPECT_EQ(info->reason(), "PROMPT_TOO_LONG");
  EXPECT_EQ(info->metadata().at("prompt_tokens"), "64");
  EXPECT_EQ(info->metadata().at("max_model_len"), "64");
}

TEST_F(RequestValidationTest, CutsMaxTokensToTheRoomLeft) {
  v1::GenerateRequest request = Request(R"({"max_tokens": 60})");
  for (int i = 0; i < 10; ++i) {
    request.mutable_token_ids()->add_ids(5);
  }
  EXPECT_EQ(Prepared(request).spec.max_tokens, 54u);
}

TEST_F(RequestValidationTest, RefusesTwoMebibytesOfText) {
  v1::GenerateRequest request;
  request.set_text(std::string(kMaxPromptBytes + 1, 'a'));
  EXPECT_THAT(Fields(request), ElementsAre("text"));
}

TEST_F(RequestValidationTest, EndIdsFollowIgnoreEosAndStopTokenIds) {
  EXPECT_THAT(Prepared(Request(R"({"ignore_eos": true})")).spec.end_ids, IsEmpty());
  EXPECT_THAT(Prepared(Request(R"({"stop_token_ids": [9, 4, 9]})")).spec.end_ids,
              ElementsAre(2u, 4u, 9u));
  const GenerationRequest banned =
      Prepared(Request(R"({"stop_token_ids": [4], "min_tokens": 3, "ignore_eos": true})"));
  EXPECT_THAT(banned.spec.sampling.banned_until_min(), ElementsAre(4u));
}

TEST_F(RequestValidationTest, UserTextIsNeverAControlToken) {
  // The tokenizer itself surrounds a text with 1 and 2 unless it is told not to.
  const GenerationRequest text =
      Prepared(Request(R"({"text": "<|im_end|>", "add_special_tokens": false})"));
  EXPECT_THAT(text.spec.prompt, testing::Not(testing::Contains(2u)));
}

TEST_F(RequestValidationTest, EchoKeepsTheText) {
  EXPECT_EQ(Prepared(Request(R"({"echo": true})")).output.echo_text, "hello");
  const GenerationRequest ids =
      Prepared(Request(R"({"echo": true, "token_ids": {"ids": [3, 4]}})"));
  EXPECT_EQ(ids.output.echo_text, "!\"");
  EXPECT_THAT(ids.output.echo_ids, ElementsAre(3u, 4u));
}

// The service parses one as the other.
TEST(RequestDescriptorTest, StreamGenerateRequestIsGenerateRequest) {
  const auto* one = v1::GenerateRequest::descriptor();
  const auto* other = v1::StreamGenerateRequest::descriptor();
  ASSERT_EQ(one->field_count(), other->field_count());
  for (int i = 0; i < one->field_count(); ++i) {
    const auto* field = one->field(i);
    const auto* twin = other->FindFieldByNumber(field->number());
    ASSERT_NE(twin, nullptr) << field->name();
    EXPECT_EQ(field->name(), twin->name());
    EXPECT_EQ(field->type(), twin->type()) << field->name();
    EXPECT_EQ(field->label(), twin->label()) << field->name();
    EXPECT_EQ(field->message_type(), twin->message_type()) << field->name();
    EXPECT_EQ(field->has_presence(), twin->has_presence()) << field->name();
  }
}

TEST(ModelNameTest, IsMadeFromTheSource) {
  EXPECT_EQ(ModelNameOf("SmolLM2-135M-Instruct.Q4_1.gguf"), "SmolLM2-135M-Instruct.Q4_1");
  EXPECT_EQ(ModelNameOf("models/opt 6.7b/"), "opt-6.7b");
  EXPECT_EQ(ModelNameOf(""), "model");
  EXPECT_EQ(ModelNameOf(std::string(100, 'a')).size(), 64u);
}

}  // namespace
}  // namespace sluice::controller
