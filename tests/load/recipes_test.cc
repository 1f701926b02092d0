// The recipes for ghz (tests/load/*.json): each names a method that exists, its data parses into that method's request with no field
// unknown, and ghz knows each of its keys. So a recipe cannot fall behind the protos.
#include <google/protobuf/descriptor.h>
#include <google/protobuf/message.h>
#include <google/protobuf/util/json_util.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "proto/sluice/v1/generation.pb.h"

namespace sluice {
namespace {

namespace fs = std::filesystem;
namespace pb = google::protobuf;
using nlohmann::json;

// Keys of ghz's configuration that a recipe may use (runner/config.go of v0.93.0); ghz ignores others silently.
const std::set<std::string>& GhzKeys() {
  static const auto* const keys = new std::set<std::string>{"async",
                                                            "call",
                                                            "concurrency",
                                                            "connections",
                                                            "count-errors",
                                                            "data",
                                                            "duration",
                                                            "duration-stop",
                                                            "insecure",
                                                            "load-end",
                                                            "load-schedule",
                                                            "load-step",
                                                            "load-step-duration",
                                                            "load-max-duration",
                                                            "load-start",
                                                            "name",
                                                            "rps",
                                                            "stream-call-count",
                                                            "stream-call-duration",
                                                            "tags",
                                                            "timeout",
                                                            "total"};
  return *keys;
}

std::vector<std::string> RecipeNames() {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(SLUICE_RECIPES)) {
    if (entry.path().extension() == ".json") {
      names.push_back(entry.path().stem().string());
    }
  }
  std::sort(names.begin(), names.end());
  return names;
}

json ReadRecipe(const std::string& name) {
  std::ifstream file(fs::path(SLUICE_RECIPES) / (name + ".json"));
  return json::parse(file);
}

// The method that "package.Service.Method" names; nullptr when there is none.
const pb::MethodDescriptor* MethodOf(const std::string& call) {
  v1::GenerateRequest::descriptor();  // Links the file in
  return pb::DescriptorPool::generated_pool()->FindMethodByName(call);
}

// Each message that the data stands for: an array is one message a call in turn.
std::vector<json> MessagesOf(const json& recipe) {
  const json& data = recipe.at("data");
  return data.is_array() ? data.get<std::vector<json>>() : std::vector<json>{data};
}

pb::util::Status ParseData(const json& data, pb::Message* request) {
  return pb::util::JsonStringToMessage(data.dump(), request, pb::util::JsonParseOptions());
}

std::unique_ptr<pb::Message> NewRequest(const pb::MethodDescriptor& method) {
  const pb::Message* prototype =
      pb::MessageFactory::generated_factory()->GetPrototype(method.input_type());
  return std::unique_ptr<pb::Message>(prototype->New());
}

class RecipeTest : public testing::TestWithParam<std::string> {};

TEST_P(RecipeTest, DataIsARequestOfItsMethod) {
  const json recipe = ReadRecipe(GetParam());
  const pb::MethodDescriptor* method = MethodOf(recipe.at("call").get<std::string>());
  ASSERT_NE(method, nullptr) << recipe.at("call");
  const std::vector<json> messages = MessagesOf(recipe);
  ASSERT_FALSE(messages.empty());
  for (const json& data : messages) {
    const std::unique_ptr<pb::Message> request = NewRequest(*method);
    const auto status = ParseData(data, request.get());
    ASSERT_TRUE(status.ok()) << status.message() << " in " << data;
    const pb::OneofDescriptor* prompt = method->input_type()->FindOneofByName("prompt");
    ASSERT_NE(prompt, nullptr);
    EXPECT_TRUE(request->GetReflection()->HasOneof(*request, prompt)) << "no prompt: " << data;
    EXPECT_TRUE(data.contains("max_tokens")) << "how long it runs depends on a default: " << data;
  }
}

TEST_P(RecipeTest, HasOnlyKeysThatGhzKnows) {
  const json recipe = ReadRecipe(GetParam());
  for (const auto& [key, value] : recipe.items()) {
    EXPECT_EQ(GhzKeys().count(key), 1u) << key;
  }
}

TEST_P(RecipeTest, SaysItsNameAndHowCallsEnd) {
  const json recipe = ReadRecipe(GetParam());
  EXPECT_EQ(recipe.at("name"), GetParam());
  EXPECT_THAT(recipe.at("tags").at("expect").get<std::string>(), testing::AnyOf("OK", "Canceled"));
  EXPECT_FALSE(recipe.at("tags").at("what").get<std::string>().empty());
  // ghz takes a time of 0 for "not set" and then ends calls after 20 s.
  EXPECT_THAT(recipe.at("timeout").get<std::string>(), testing::Not(testing::StartsWith("0")));
}

// A connection carries 100 calls at most (services/rpc): ghz would queue the others by itself, and measure its own queue.
TEST_P(RecipeTest, HasConnectionsEnough) {
  const json recipe = ReadRecipe(GetParam());
  EXPECT_LE(recipe.at("concurrency").get<int>(), 100 * recipe.value("connections", 1));
}

INSTANTIATE_TEST_SUITE_P(Load, RecipeTest, testing::ValuesIn(RecipeNames()),
                         [](const auto& info) { return info.param; });

TEST(RecipesTest, AreAllThere) {
  EXPECT_THAT(RecipeNames(),
              testing::ElementsAre("cancel", "soak", "step", "stream", "ttft", "unary"));
}

// The checks above can fail: an unknown field, a wrong type, no such method.
TEST(RecipesTest, WrongDataIsRefused) {
  v1::GenerateRequest request;
  EXPECT_FALSE(ParseData({{"text", "x"}, {"max_token", 3}}, &request).ok());
  EXPECT_FALSE(ParseData({{"text", "x"}, {"max_tokens", "many"}}, &request).ok());
  EXPECT_FALSE(ParseData({{"text", "x"}, {"max_tokens", -1}}, &request).ok());
  EXPECT_EQ(MethodOf("sluice.v1.GenerationService.Generates"), nullptr);
}

}  // namespace
}  // namespace sluice
