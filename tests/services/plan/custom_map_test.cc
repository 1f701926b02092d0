#include "services/plan/custom_map.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "absl/strings/str_join.h"
#include "tests/services/plan/plan_models.h"

namespace sluice::plan {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Pair;

constexpr uint64_t kMiB = 1 << 20;

class CustomMapTest : public ::testing::Test {
 protected:
  absl::StatusOr<DeviceMapPlan> Plan(const std::string& json, bool hf_compat = false) {
    PlanOptions options;
    options.mode = MapMode::kCustom;
    options.custom_json = json;
    options.hf_compat = hf_compat;
    return PlanDeviceMap(SmallLlama(4, kMiB, kMiB, /*tied=*/false), memory_, options);
  }

  std::string ErrorOf(const std::string& json) {
    auto plan = Plan(json);
    EXPECT_EQ(plan.status().code(), absl::StatusCode::kInvalidArgument) << json;
    return std::string(plan.status().message());
  }

  MaxMemory memory_ = {{"0", 1024 * kMiB}, {"1", 1024 * kMiB}, {"cpu", 1024 * kMiB}};
};

TEST_F(CustomMapTest, LongestNameWins) {
  auto plan =
      Plan(R"({"": 1, "model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "0"})");
  ASSERT_TRUE(plan.ok()) << plan.status();
  ASSERT_EQ(plan->stages.size(), 2u);
  EXPECT_EQ(plan->stages[0].layer_end, 2u);
  EXPECT_EQ(plan->stages[1].device, "1");
  EXPECT_THAT(plan->notes, ::testing::Not(::testing::Contains(HasSubstr("changed"))));
}

TEST_F(CustomMapTest, EverythingOnOneDevice) {
  for (const char* json : {R"({"": "cuda:1"})", R"({"": 1})", "1", "cuda:1"}) {
    auto plan = Plan(json);
    ASSERT_TRUE(plan.ok()) << plan.status();
    EXPECT_THAT(plan->hf_device_map, ElementsAre(Pair("", "1")));
  }
}

TEST_F(CustomMapTest, WarnsWhenAGeneralKeyComesLater) {
  auto plan = Plan(R"({"model.layers.0": 0, "model.embed_tokens": 0, "": 1})");
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->stages[0].layer_end, 1u);
  EXPECT_THAT(plan->notes, ::testing::Contains(HasSubstr("comes after \"model.layers.0\"")));
}

TEST_F(CustomMapTest, WarnsOfUnknownKeys) {
  auto plan = Plan(R"({"transformer.h.0": 0, "": 1})");
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_THAT(plan->notes, ::testing::Contains(HasSubstr("\"transformer.h.0\": no such module")));
}

TEST_F(CustomMapTest, UncoveredParametersAreNamedAsAccelerateDoes) {
  EXPECT_EQ(ErrorOf(R"({"model": 0})"),
            "The device_map provided does not give any device for the following parameters: "
            "lm_head.weight");
  EXPECT_THAT(ErrorOf(R"({"model.embed_tokens": 0, "model.layers": 0, "lm_head": 0})"),
              HasSubstr("following parameters: model.norm.weight"));
  // "model.layers.1" is not a prefix of "model.layers.10".
  EXPECT_THAT(ErrorOf(R"({"model.layer": 0, "lm_head": 0})"), HasSubstr("model.layers.3.mlp"));
}

TEST_F(CustomMapTest, RefusesWhatIsNotAMap) {
  EXPECT_THAT(ErrorOf("{"), HasSubstr("expected a JSON object"));
  EXPECT_THAT(ErrorOf("{}"), HasSubstr("expected a JSON object"));
  EXPECT_THAT(ErrorOf("[0]"), HasSubstr("expected a JSON object"));
  EXPECT_THAT(ErrorOf(R"({"": -1})"), HasSubstr("-1 is not a device"));
  EXPECT_THAT(ErrorOf(R"({"": [0]})"), HasSubstr("is not a device"));
  EXPECT_THAT(ErrorOf(R"({"": "gpu"})"), HasSubstr("\"gpu\" is not a device"));
  EXPECT_THAT(ErrorOf(R"({"": 7})"), HasSubstr("no device 7; there are 0, 1, cpu"));
  EXPECT_THAT(ErrorOf(std::string(2 << 20, ' ') + "{}"), HasSubstr("1 MiB"));
  EXPECT_THAT(ErrorOf(std::string(100000, '[')), HasSubstr("expected a JSON object"));
}

TEST_F(CustomMapTest, RefusesWhatAPipelineCannotRun) {
  EXPECT_THAT(ErrorOf(R"({"": 0, "model.layers.1": 1})"),
              HasSubstr("model.layers.2 returns to device 0"));
  EXPECT_THAT(ErrorOf(R"({"": 0, "model.layers.1.mlp": 1})"),
              HasSubstr("model.layers.1 is on 0 and on 1; a layer is never split"));
  EXPECT_THAT(ErrorOf(R"({"": 0, "model.layers.3": "disk"})"), HasSubstr("\"disk\" is storage"));
}

TEST_F(CustomMapTest, MovesHeadAndEmbeddingAndSaysSo) {
  auto plan = Plan(R"({"": 0, "model.layers.2": 1, "model.layers.3": 1})");
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_TRUE(plan->stages[1].has_head);
  EXPECT_THAT(plan->notes, ::testing::Contains(
                               HasSubstr("lm_head is with the last layer on device 1, not on 0")));
  // Norm and head are counted where they are: 2 layers, 256 bytes of norm, 1 MiB of head.
  EXPECT_EQ(plan->stages[1].weight_bytes, 3 * kMiB + 256);
}

TEST_F(CustomMapTest, StagesMayComeInAnyOrderOfDevices) {
  auto plan =
      Plan(R"({"": "cpu", "model.layers.0": 1, "model.embed_tokens": 1, "model.layers.1": 0})");
  ASSERT_TRUE(plan.ok()) << plan.status();
  ASSERT_EQ(plan->stages.size(), 3u);
  EXPECT_EQ(plan->stages[0].device, "1");
  EXPECT_EQ(plan->stages[1].device, "0");
  EXPECT_EQ(plan->stages[2].device, "cpu");
}

TEST_F(CustomMapTest, DoesNotFitSaysWhereAndWhatWould) {
  memory_["0"] = 40 * kMiB;
  auto plan = Plan(R"({"": 0})");
  ASSERT_EQ(plan.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(plan.status().message()), HasSubstr("device 0 with layers 0-3 needs"));
  EXPECT_THAT(std::string(plan.status().message()), HasSubstr("--device-map auto"));
}

TEST_F(CustomMapTest, HfCompatPrintsTheMapAsGiven) {
  auto plan =
      Plan(R"({"model": 0, "model.layers.3": "disk", "lm_head": "cpu"})", /*hf_compat=*/true);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_THAT(plan->hf_device_map, ElementsAre(Pair("model", "0"), Pair("model.layers.3", "disk"),
                                               Pair("lm_head", "cpu")));
  EXPECT_THAT(plan->stages, IsEmpty());
  EXPECT_THAT(absl::StrJoin(plan->notes, "\n"), HasSubstr("a pipeline cannot follow this map"));
}

}  // namespace
}  // namespace sluice::plan
