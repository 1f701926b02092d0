#include "services/plan/pipeline_plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>
#include <regex>

#include "absl/strings/str_join.h"
#include "tests/services/plan/plan_models.h"

namespace sluice::plan {
namespace {

using internal::v1::PlanShardsResponse;
using ::testing::Contains;
using ::testing::HasSubstr;

constexpr uint64_t kMiB = 1 << 20;
constexpr uint64_t kKvPerLayerBlock = 32 * 1024;  // K and V, 2 heads of 64 float32, 32 tokens
constexpr uint64_t kKvPerLayer = kKvPerLayerBlock * 64;  // One sequence of 2048 tokens: 2 MiB

PlanOptions Mode(MapMode mode) {
  PlanOptions options;
  options.mode = mode;
  return options;
}

uint64_t Workspace(const PlanShardsResponse& model, bool head) {
  const ModelCosts costs = CostsOf(model, PlanOptions());
  return costs.workspace + (head ? costs.head_workspace : 0);
}

// What every plan must keep, whatever the model and the devices are.
void CheckInvariants(const PlanShardsResponse& model, const MaxMemory& memory,
                     const PlanOptions& options, const DeviceMapPlan& plan) {
  const ModelCosts costs = CostsOf(model, options);
  ASSERT_FALSE(plan.stages.empty());
  uint32_t next = 0;
  uint64_t weights = 0;
  std::set<Device> devices;
  for (const StagePlan& stage : plan.stages) {
    EXPECT_EQ(stage.layer_begin, next);
    EXPECT_LT(stage.layer_begin, stage.layer_end);
    next = stage.layer_end;
    EXPECT_TRUE(devices.insert(stage.device).second) << "device twice: " << stage.device;
    EXPECT_EQ(stage.limit_bytes, memory.at(stage.device));
    EXPECT_LE(stage.weight_bytes + stage.kv_bytes + stage.workspace_bytes, stage.limit_bytes);
    EXPECT_EQ(stage.kv_bytes, stage.kv_bytes_per_block * plan.num_blocks);
    EXPECT_EQ(stage.has_embedding, stage.layer_begin == 0);
    EXPECT_EQ(stage.has_head, stage.layer_end == model.config().num_layers());
    EXPECT_FALSE(stage.reason.empty());
    weights += stage.weight_bytes;
  }
  EXPECT_EQ(next, model.config().num_layers());
  uint64_t all = 0;
  for (const auto& tensor : model.tensors()) {
    all += tensor.bytes();
  }
  EXPECT_EQ(weights, all + (plan.stages.size() > 1 ? costs.tied_table : 0));
  EXPECT_GE(plan.num_blocks, costs.min_blocks);
  EXPECT_GE(plan.max_concurrency, 1u);
}

TEST(PipelinePlan, RandomSweepKeepsTheInvariants) {
  std::mt19937 random(7);
  auto between = [&](uint64_t low, uint64_t high) {
    return std::uniform_int_distribution<uint64_t>(low, high)(random);
  };
  int fitted = 0;
  int refused = 0;
  for (int round = 0; round < 3000; ++round) {
    const bool tied = between(0, 1) == 1;
    const PlanShardsResponse model =
        SmallLlama(between(1, 24), between(1, 64) * kMiB, between(1, 128) * kMiB, tied);
    MaxMemory memory;
    for (uint64_t i = 0, n = between(1, 6); i < n; ++i) {
      memory[std::to_string(i)] = between(0, 900) * kMiB;
    }
    if (between(0, 2) == 0) {
      memory["cpu"] = between(0, 900) * kMiB;
    }
    PlanOptions options;
    options.max_model_len = between(0, 1) == 0 ? 0 : between(16, 2048);
    bool fits[3];
    int index = 0;
    for (MapMode mode : {MapMode::kSequential, MapMode::kAuto, MapMode::kBalancedLow0}) {
      options.mode = mode;
      auto plan = PlanDeviceMap(model, memory, options);
      fits[index++] = plan.ok();
      if (plan.ok()) {
        CheckInvariants(model, memory, options, *plan);
        ++fitted;
      } else {
        ASSERT_EQ(plan.status().code(), absl::StatusCode::kResourceExhausted) << plan.status();
        ++refused;
      }
    }
    EXPECT_EQ(fits[0], fits[1]) << "whether it fits must not depend on the mode, round " << round;
    EXPECT_EQ(fits[0], fits[2]) << "whether it fits must not depend on the mode, round " << round;
    ASSERT_FALSE(HasFailure()) << "round " << round;
  }
  EXPECT_GT(fitted, 1000);
  EXPECT_GT(refused, 1000);
}

TEST(PipelinePlan, AutoIsAsEvenAsItCanBe) {
  // Embedding and head weigh as much as a layer with its KV: 12 layers + 2 over 2 devices are 7
  // and 7.
  const PlanShardsResponse model = SmallLlama(12, 8 * kMiB, 12 * kMiB, /*tied=*/false);
  const MaxMemory memory = {{"0", 4096 * kMiB}, {"1", 4096 * kMiB}};
  auto plan = PlanDeviceMap(model, memory, Mode(MapMode::kAuto));
  ASSERT_TRUE(plan.ok()) << plan.status();
  ASSERT_EQ(plan->stages.size(), 2u);
  EXPECT_EQ(plan->stages[0].layer_end, 6u);
}

TEST(PipelinePlan, AutoIsTheBestCutByBruteForce) {
  std::mt19937 random(11);
  auto between = [&](uint64_t low, uint64_t high) {
    return std::uniform_int_distribution<uint64_t>(low, high)(random);
  };
  for (int round = 0; round < 200; ++round) {
    const PlanShardsResponse model = SmallLlama(between(3, 12), between(1, 64) * kMiB,
                                                between(1, 200) * kMiB, between(0, 1) == 1);
    const MaxMemory memory = {{"0", 8192 * kMiB}, {"1", 8192 * kMiB}, {"2", 8192 * kMiB}};
    auto plan = PlanDeviceMap(model, memory, Mode(MapMode::kAuto));
    ASSERT_TRUE(plan.ok()) << plan.status();
    const ModelCosts costs = CostsOf(model, PlanOptions());
    auto largest = [&](const std::vector<uint32_t>& ends) {
      uint64_t bytes = 0;
      uint32_t begin = 0;
      for (uint32_t end : ends) {
        if (end > begin) {
          bytes = std::max(bytes, StageBytes(costs, begin, end, costs.min_blocks));
        }
        begin = end;
      }
      return bytes;
    };
    const uint32_t layers = model.config().num_layers();
    uint64_t best = UINT64_MAX;
    for (uint32_t a = 1; a <= layers; ++a) {
      for (uint32_t b = a; b <= layers; ++b) {
        best = std::min(best, largest({a, b, layers}));
      }
    }
    std::vector<uint32_t> ends;
    for (const StagePlan& stage : plan->stages) {
      ends.push_back(stage.layer_end);
    }
    EXPECT_EQ(largest(ends), best) << "round " << round;
  }
}

TEST(PipelinePlan, SequentialFillsAndLeavesTheRestEmpty) {
  const PlanShardsResponse model = SmallLlama(8, 8 * kMiB, 8 * kMiB, /*tied=*/false);
  // Room for the embedding and exactly three layers with their KV.
  const uint64_t exact = 8 * kMiB + 3 * (8 * kMiB + kKvPerLayer) + Workspace(model, /*head=*/false);
  MaxMemory memory = {{"0", exact}, {"1", 1024 * kMiB}, {"2", 1024 * kMiB}};
  auto plan = PlanDeviceMap(model, memory, Mode(MapMode::kSequential));
  ASSERT_TRUE(plan.ok()) << plan.status();
  ASSERT_EQ(plan->stages.size(), 2u);
  EXPECT_EQ(plan->stages[0].layer_end, 3u);
  EXPECT_THAT(plan->notes, Contains(HasSubstr("device 2 is not used")));
  memory["0"] = exact - 1;
  plan = PlanDeviceMap(model, memory, Mode(MapMode::kSequential));
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->stages[0].layer_end, 2u);
}

TEST(PipelinePlan, DevicesAreFilledByNumberNotByText) {
  const PlanShardsResponse model = SmallLlama(8, 8 * kMiB, 8 * kMiB, /*tied=*/false);
  const MaxMemory memory = {{"2", 100 * kMiB}, {"10", 1024 * kMiB}};
  auto plan = PlanDeviceMap(model, memory, Mode(MapMode::kSequential));
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->stages.front().device, "2");
  EXPECT_EQ(plan->stages.back().device, "10");
}

TEST(PipelinePlan, CpuIsUsedOnlyForWhatTheOthersCannotHold) {
  const PlanShardsResponse model = SmallLlama(8, 8 * kMiB, 8 * kMiB, /*tied=*/false);
  auto enough = PlanDeviceMap(model, {{"0", 512 * kMiB}, {"1", 512 * kMiB}, {"cpu", 4096 * kMiB}},
                              Mode(MapMode::kAuto));
  ASSERT_TRUE(enough.ok()) << enough.status();
  EXPECT_EQ(enough->stages.back().device, "1");
  EXPECT_THAT(enough->notes, Contains(HasSubstr("device cpu is not used")));
  auto spill = PlanDeviceMap(model, {{"0", 72 * kMiB}, {"1", 72 * kMiB}, {"cpu", 4096 * kMiB}},
                             Mode(MapMode::kAuto));
  ASSERT_TRUE(spill.ok()) << spill.status();
  EXPECT_EQ(spill->stages.size(), 3u);
  EXPECT_EQ(spill->stages.back().device, "cpu");
}

TEST(PipelinePlan, BalancedLow0GivesDeviceZeroOnlyWhatIsLeft) {
  const PlanShardsResponse model = SmallLlama(8, 8 * kMiB, 8 * kMiB, /*tied=*/false);
  const MaxMemory roomy = {{"0", 512 * kMiB}, {"1", 512 * kMiB}, {"2", 512 * kMiB}};
  auto plan = PlanDeviceMap(model, roomy, Mode(MapMode::kBalancedLow0));
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->stages.front().device, "1");
  const MaxMemory tight = {{"0", 512 * kMiB}, {"1", 75 * kMiB}, {"2", 75 * kMiB}};
  plan = PlanDeviceMap(model, tight, Mode(MapMode::kBalancedLow0));
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->stages.size(), 3u);
  const uint32_t low = plan->stages.front().layer_end;
  auto even = PlanDeviceMap(model, tight, Mode(MapMode::kSequential));
  EXPECT_LT(low, even->stages.front().layer_end);
}

TEST(PipelinePlan, TiedHeadIsCopiedOnlyWhenTheStagesDiffer) {
  const PlanShardsResponse model = SmallLlama(4, 8 * kMiB, 20 * kMiB, /*tied=*/true);
  auto one = PlanDeviceMap(model, {{"0", 512 * kMiB}}, Mode(MapMode::kAuto));
  ASSERT_TRUE(one.ok()) << one.status();
  EXPECT_EQ(one->stages[0].weight_bytes, (4 * 8 + 20) * kMiB + 256);
  EXPECT_THAT(one->notes, ::testing::Not(Contains(HasSubstr("copy"))));
  auto two = PlanDeviceMap(model, {{"0", 512 * kMiB}, {"1", 512 * kMiB}}, Mode(MapMode::kAuto));
  ASSERT_TRUE(two.ok()) << two.status();
  EXPECT_EQ(two->stages[1].weight_bytes, (2 * 8 + 20) * kMiB + 256);
  EXPECT_THAT(two->notes, Contains(HasSubstr("device 1 holds a copy of it, 20.0 MiB")));
}

TEST(PipelinePlan, BlocksAreWhatIsLeftUpToWhatCanBeUsed) {
  const PlanShardsResponse model = SmallLlama(4, 8 * kMiB, 8 * kMiB, /*tied=*/false);
  const uint64_t fixed = (4 * 8 + 2 * 8) * kMiB + 256 + Workspace(model, /*head=*/true);
  auto plan =
      PlanDeviceMap(model, {{"0", fixed + 100 * 4 * kKvPerLayerBlock}}, Mode(MapMode::kAuto));
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->num_blocks, 100u);
  EXPECT_EQ(plan->max_concurrency, 1u);
  EXPECT_THAT(plan->notes, Contains(HasSubstr("device 0 limits it to 100 blocks")));
  plan = PlanDeviceMap(model, {{"0", 1ull << 40}}, Mode(MapMode::kAuto));
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->num_blocks, 16u * 64u);  // max_batch_size sequences of 2048 tokens
  EXPECT_EQ(plan->max_concurrency, 16u);
}

TEST(PipelinePlan, KvReserveRaisesTheNeed) {
  const PlanShardsResponse model = SmallLlama(4, 8 * kMiB, 8 * kMiB, /*tied=*/false);
  const MaxMemory memory = {{"0", 150 * kMiB}};
  PlanOptions options;
  EXPECT_TRUE(PlanDeviceMap(model, memory, options).ok());
  options.kv_reserve_bytes = 100 * kMiB;
  auto plan = PlanDeviceMap(model, memory, options);
  ASSERT_EQ(plan.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(plan.status().message()), HasSubstr("no KV reserve"));
}

// Numbers that an error proposes are true: following them makes the plan fit, and one step less
// does not.
TEST(PipelinePlan, AdviceIsTrue) {
  const PlanShardsResponse model = SmallLlama(8, 8 * kMiB, 8 * kMiB, /*tied=*/false);
  const MaxMemory memory = {{"0", 70 * kMiB}, {"1", 90 * kMiB}};
  PlanOptions options;
  auto plan = PlanDeviceMap(model, memory, options);
  ASSERT_EQ(plan.status().code(), absl::StatusCode::kResourceExhausted);
  const std::string text(plan.status().message());
  EXPECT_THAT(text, HasSubstr("misses"));
  EXPECT_THAT(text, HasSubstr("norm and head are left"));
  std::smatch match;
  ASSERT_TRUE(std::regex_search(text, match, std::regex("--max-model-len (\\d+)"))) << text;
  options.max_model_len = std::stoi(match[1]);
  EXPECT_TRUE(PlanDeviceMap(model, memory, options).ok()) << text;
  options.max_model_len += options.block_size;
  EXPECT_FALSE(PlanDeviceMap(model, memory, options).ok()) << text;
  options.max_model_len = 0;
  ASSERT_TRUE(std::regex_search(text, match, std::regex("--max-memory 1=(\\d+MiB)"))) << text;
  MaxMemory more = memory;
  more["1"] = *ParseBytes(match[1]);
  EXPECT_TRUE(PlanDeviceMap(model, more, options).ok()) << text;
  ASSERT_TRUE(std::regex_search(text, match, std::regex("cpu=(\\d+MiB)"))) << text;
  more = memory;
  more["cpu"] = *ParseBytes(match[1]);
  EXPECT_TRUE(PlanDeviceMap(model, more, options).ok()) << text;
}

TEST(PipelinePlan, HopelessModelsGetAPlainAnswer) {
  const PlanShardsResponse model = SmallLlama(8, 8 * kMiB, 8 * kMiB, /*tied=*/false);
  auto plan = PlanDeviceMap(model, {{"0", 1 * kMiB}}, PlanOptions());
  ASSERT_EQ(plan.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(plan.status().message()),
              HasSubstr("device 0 (1.0 MiB) is too small for one layer more"));
}

TEST(PipelinePlan, WrongOptionsAreNamed) {
  const PlanShardsResponse model = SmallLlama(2, kMiB, kMiB, /*tied=*/false);
  PlanOptions options;
  options.max_model_len = 2049;
  auto plan = PlanDeviceMap(model, {{"0", 1024 * kMiB}}, options);
  EXPECT_EQ(plan.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(plan.status().message()), HasSubstr("2048"));
  options = PlanOptions();
  options.block_size = 0;
  EXPECT_FALSE(PlanDeviceMap(model, {{"0", 1024 * kMiB}}, options).ok());
  EXPECT_FALSE(PlanDeviceMap(model, {}, PlanOptions()).ok());
  EXPECT_FALSE(PlanDeviceMap(model, {{"disk", 1ull << 40}}, PlanOptions()).ok());
  EXPECT_FALSE(PlanDeviceMap(PlanShardsResponse(), {{"0", kMiB}}, PlanOptions()).ok());
}

}  // namespace
}  // namespace sluice::plan
