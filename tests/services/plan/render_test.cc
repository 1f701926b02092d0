#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "services/plan/device_map.h"
#include "tests/services/plan/plan_models.h"

namespace sluice::plan {
namespace {

using ::testing::HasSubstr;

DeviceMapPlan Plan() {
  auto plan = PlanDeviceMap(SmallLlama(4, 1 << 20, 1 << 20, /*tied=*/false),
                            {{"0", 1ull << 30}, {"cpu", 1ull << 30}}, [] {
                              PlanOptions options;
                              options.mode = MapMode::kCustom;
                              options.custom_json =
                                  R"({"": "cpu", "model.embed_tokens": 0, "model.layers.0": 0})";
                              return options;
                            }());
  EXPECT_TRUE(plan.ok()) << plan.status();
  return *plan;
}

TEST(Render, TextHasTableBlocksMapAndNotes) {
  const std::string text = ToText(Plan());
  EXPECT_THAT(text, HasSubstr("embedding, layers 0-0"));
  EXPECT_THAT(text, HasSubstr("layers 1-3, norm, head"));
  EXPECT_THAT(text, HasSubstr("custom map"));
  EXPECT_THAT(text, HasSubstr("KV blocks: 1024, enough for 16 sequences of 2048 tokens"));
  EXPECT_THAT(text, HasSubstr("\"model.layers.1-3\""));
  EXPECT_THAT(text, HasSubstr("note: KV cache"));
}

TEST(Render, JsonReadsBack) {
  const nlohmann::json json = nlohmann::json::parse(ToJson(Plan()));
  EXPECT_EQ(json["hf_device_map"]["model.layers.0"], 0);
  EXPECT_EQ(json["hf_device_map"]["model.layers.3"], "cpu");
  ASSERT_EQ(json["stages"].size(), 2u);
  EXPECT_EQ(json["stages"][1]["layer_begin"], 1);
  EXPECT_EQ(json["stages"][1]["device"], "cpu");
  EXPECT_EQ(json["num_blocks"], 1024);
  EXPECT_EQ(json["max_concurrency"], 16);
}

}  // namespace
}  // namespace sluice::plan
