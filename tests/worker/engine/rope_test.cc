#include "worker/engine/rope.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace sluice::worker {
namespace {

using internal::v1::ModelConfig;
using testing::ElementsAre;
using testing::HasSubstr;

constexpr float kRelative = 2e-7f;  // Rounding of a float, and of the decimal digits below

ModelConfig MakeConfig(const std::string& type, double theta, uint32_t head_dim) {
  ModelConfig config;
  config.set_head_dim(head_dim);
  config.mutable_rope()->set_type(type);
  config.mutable_rope()->set_theta(theta);
  config.mutable_rope()->set_factor(1);
  return config;
}

void ExpectFrequencies(const float* actual, const std::vector<double>& expected) {
  for (size_t i = 0; i < expected.size(); ++i) {
    EXPECT_NEAR(actual[i], expected[i], kRelative * expected[i] * 3) << "i = " << i;
  }
}

// Values below: the formulas of rope.h evaluated in Python.

TEST(RopeTest, Default) {
  const auto rope = RopeFrequencies::Create(MakeConfig("default", 10000, 8));
  ASSERT_TRUE(rope.ok()) << rope.status();
  EXPECT_EQ(rope->half_dim(), 4);
  EXPECT_FALSE(rope->depends_on_length());
  ExpectFrequencies(rope->ForLength(1000000, nullptr), {1, 0.1, 0.01, 0.001});
}

TEST(RopeTest, LinearDividesByTheFactor) {
  ModelConfig config = MakeConfig("linear", 10000, 8);
  config.mutable_rope()->set_factor(4);
  const auto rope = RopeFrequencies::Create(config);
  ASSERT_TRUE(rope.ok()) << rope.status();
  ExpectFrequencies(rope->ForLength(5, nullptr), {0.25, 0.025, 0.0025, 0.00025});
}

TEST(RopeTest, Llama3OfLlama31) {
  ModelConfig config = MakeConfig("llama3", 500000, 16);
  auto* scaling = config.mutable_rope();
  scaling->set_factor(8);
  scaling->set_low_freq_factor(1);
  scaling->set_high_freq_factor(4);
  scaling->set_original_max_position_embeddings(8192);
  const auto rope = RopeFrequencies::Create(config);
  ASSERT_TRUE(rope.ok()) << rope.status();
  // 0..3 kept, 4 between (0.00141421356 unscaled), 5..7 divided by 8.
  ExpectFrequencies(rope->ForLength(1, nullptr),
                    {1, 0.193922745, 0.0376060309, 0.00729266474, 0.000524846161, 3.4281022e-05,
                     6.64786987e-06, 1.28917317e-06});
}

TEST(RopeTest, Llama3OfLlama32) {
  ModelConfig config = MakeConfig("llama3", 10000, 8);
  auto* scaling = config.mutable_rope();
  scaling->set_factor(32);
  scaling->set_low_freq_factor(1);
  scaling->set_high_freq_factor(4);
  scaling->set_original_max_position_embeddings(64);
  const auto rope = RopeFrequencies::Create(config);
  ASSERT_TRUE(rope.ok()) << rope.status();
  ExpectFrequencies(rope->ForLength(1, nullptr), {1, 0.00372535491, 0.0003125, 3.125e-05});
}

TEST(RopeTest, DynamicStretchesBeyondTheOriginalLength) {
  ModelConfig config = MakeConfig("dynamic", 10000, 8);
  config.mutable_rope()->set_factor(2);
  config.mutable_rope()->set_original_max_position_embeddings(64);
  const auto rope = RopeFrequencies::Create(config);
  ASSERT_TRUE(rope.ok()) << rope.status();
  EXPECT_TRUE(rope->depends_on_length());
  float scratch[4] = {};
  ExpectFrequencies(rope->ForLength(1, scratch), {1, 0.1, 0.01, 0.001});
  ExpectFrequencies(rope->ForLength(64, scratch), {1, 0.1, 0.01, 0.001});
  EXPECT_THAT(scratch, ElementsAre(0, 0, 0, 0));
  ExpectFrequencies(rope->ForLength(65, scratch), {1, 0.0989795206, 0.0097969455, 0.00096969697});
  ExpectFrequencies(rope->ForLength(100, scratch),
                    {1, 0.0777822237, 0.00605007433, 0.000470588235});
  ExpectFrequencies(rope->ForLength(128, scratch),
                    {1, 0.0693361274, 0.00480749857, 0.000333333333});
}

TEST(RopeTest, RefusesWhatCannotBeComputed) {
  const auto message = [](const ModelConfig& config) {
    const auto rope = RopeFrequencies::Create(config);
    EXPECT_EQ(rope.status().code(), absl::StatusCode::kInvalidArgument);
    return std::string(rope.status().message());
  };
  EXPECT_THAT(message(MakeConfig("yarn", 10000, 8)), HasSubstr("yarn"));
  EXPECT_THAT(message(MakeConfig("default", 0, 8)), HasSubstr("theta"));
  ModelConfig config = MakeConfig("linear", 10000, 8);
  config.mutable_rope()->set_factor(0);
  EXPECT_THAT(message(config), HasSubstr("factor"));
  config = MakeConfig("dynamic", 10000, 8);
  EXPECT_THAT(message(config), HasSubstr("original_max_position_embeddings"));
  config.mutable_rope()->set_original_max_position_embeddings(64);
  config.set_head_dim(2);
  EXPECT_THAT(message(config), HasSubstr("head_dim"));
  config = MakeConfig("llama3", 10000, 8);
  config.mutable_rope()->set_original_max_position_embeddings(64);
  config.mutable_rope()->set_low_freq_factor(4);
  config.mutable_rope()->set_high_freq_factor(4);
  EXPECT_THAT(message(config), HasSubstr("high_freq_factor"));
}

}  // namespace
}  // namespace sluice::worker
