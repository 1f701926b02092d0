// The 21 golden cases, made with accelerate's own functions on stub modules (sizes in plain units).
// Model T: embed 20, eight no-split blocks b0..b7 of 10 (attn 4, mlp 6), lm_head 20.
#include "services/plan/accelerate_rules.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"

namespace sluice::plan {
namespace {

using ::testing::ElementsAre;
using ::testing::Pair;
using Map = std::vector<std::pair<std::string, Device>>;

Module Leaf(const std::string& name, uint64_t bytes) {
  return {name, "Linear", {{"weight", bytes, ""}}, {}, {}};
}

Module Block(int index) {
  Module block{absl::StrCat("b", index), "Block", {}, {}, {}};
  block.children = {Leaf("attn", 4), Leaf("mlp", 6)};
  return block;
}

Module TiedHead(uint64_t bytes) {
  return {"lm_head", "Linear", {{"weight", bytes, "embed.weight"}}, {}, {}};
}

Module ModelT(bool tied = false) {
  Module root{"", "Model", {}, {}, {}};
  root.children.push_back(Leaf("embed", 20));
  for (int i = 0; i < 8; ++i) {
    root.children.push_back(Block(i));
  }
  root.children.push_back(tied ? TiedHead(20) : Leaf("lm_head", 20));
  return root;
}

Module ModelL() {
  Module root{"", "Model", {}, {}, {}};
  root.children.push_back(Leaf("embed", 262));
  for (int i = 0; i < 32; ++i) {
    Module block{absl::StrCat("b", i), "Block", {}, {}, {}};
    block.children = {Leaf("attn", 40), Leaf("mlp", 60)};
    root.children.push_back(block);
  }
  root.children.push_back(Leaf("norm", 1));
  root.children.push_back(Leaf("lm_head", 262));
  return root;
}

Module ModelOpt() {
  Module root{"", "Model", {}, {}, {}};
  root.children = {Leaf("embed", 20), Leaf("pos", 1), Leaf("final_layer_norm", 1)};
  for (int i = 0; i < 8; ++i) {
    root.children.push_back(Block(i));
  }
  root.children.push_back(TiedHead(20));
  return root;
}

RuleOptions Options() {
  RuleOptions options;
  options.no_split_classes = {"Block"};
  return options;
}

// "0: embed b0-b2 | 1: b3-b7 lm_head", in definition order.
std::string Short(const Map& map) {
  std::vector<std::pair<Device, std::string>> devices;
  std::string last;
  for (const auto& [name, device] : map) {
    if (devices.empty() || devices.back().first != device) {
      devices.emplace_back(device, "");
    }
    std::string& text = devices.back().second;
    absl::StrAppend(&text, text.empty() ? "" : " ", name.empty() ? "all" : name);
  }
  std::string result;
  for (const auto& [device, text] : devices) {
    absl::StrAppend(&result, result.empty() ? "" : " | ", device, ": ", text);
  }
  return result;
}

enum class Mode { kSequential, kAuto, kLowZero };

Budgets BudgetsOf(const Module& root, Mode mode, const Budgets& max_memory) {
  if (mode == Mode::kSequential) {
    return max_memory;
  }
  return *BalancedMemory(root, max_memory, Options(), mode == Mode::kLowZero);
}

std::string MapOf(const Module& root, Mode mode, const Budgets& max_memory,
                  const RuleOptions& options = Options()) {
  return Short(InferDeviceMap(root, BudgetsOf(root, mode, max_memory), options));
}

Budgets Times(Budgets budgets, double share) {
  for (auto& [device, bytes] : budgets) {
    bytes *= share;
  }
  return budgets;
}

TEST(AccelerateGolden, Case1) {
  EXPECT_EQ(MapOf(ModelT(), Mode::kSequential, {{"0", 60}, {"1", 100}, {"cpu", 1000}}),
            "0: embed b0 b1 | 1: b2 b3 b4 b5 b6 b7 lm_head");
}

TEST(AccelerateGolden, Case2) {
  const Budgets memory = {{"0", 200}, {"1", 200}, {"cpu", 1000}};
  EXPECT_THAT(BudgetsOf(ModelT(), Mode::kAuto, memory),
              ElementsAre(Pair("0", 72), Pair("1", 200), Pair("cpu", 1000)));
  EXPECT_EQ(MapOf(ModelT(), Mode::kAuto, memory), "0: embed b0 b1 b2 | 1: b3 b4 b5 b6 b7 lm_head");
}

TEST(AccelerateGolden, Case3) {
  const Budgets memory = {{"0", 200}, {"1", 200}, {"2", 200}, {"cpu", 1000}};
  EXPECT_THAT(BudgetsOf(ModelT(), Mode::kAuto, memory),
              ElementsAre(Pair("0", 52), Pair("1", 52), Pair("2", 200), Pair("cpu", 1000)));
  EXPECT_EQ(MapOf(ModelT(), Mode::kAuto, memory),
            "0: embed b0 | 1: b1 b2 b3 b4 b5 | 2: b6 b7 lm_head");
}

TEST(AccelerateGolden, Case4) {
  const Budgets memory = {{"0", 200}, {"1", 200}, {"2", 200}, {"3", 200}, {"cpu", 1000}};
  EXPECT_THAT(
      BudgetsOf(ModelT(), Mode::kAuto, memory),
      ElementsAre(Pair("0", 42), Pair("1", 42), Pair("2", 42), Pair("3", 200), Pair("cpu", 1000)));
  EXPECT_EQ(MapOf(ModelT(), Mode::kAuto, memory),
            "0: embed | 1: b0 b1 b2 b3 | 2: b4 b5 b6 b7 | 3: lm_head");
}

TEST(AccelerateGolden, Case5) {
  EXPECT_EQ(MapOf(ModelT(), Mode::kAuto, {{"0", 200}, {"cpu", 1000}}), "0: all");
  EXPECT_EQ(MapOf(ModelT(), Mode::kSequential, {{"0", 120}, {"cpu", 1000}}), "0: all");
}

TEST(AccelerateGolden, Case6) {
  EXPECT_EQ(MapOf(ModelT(), Mode::kSequential, {{"0", 119}, {"cpu", 1000}}),
            "0: embed b0 b1 b2 b3 b4 b5 b6 | cpu: b7 lm_head");
}

TEST(AccelerateGolden, Case7) {
  EXPECT_EQ(MapOf(ModelT(), Mode::kSequential, {{"0", 100}, {"cpu", 1000}}),
            "0: embed b0 b1 b2 b3 b4 b5 | cpu: b6 b7 lm_head");
}

TEST(AccelerateGolden, Case8) {
  const Budgets memory = {{"0", 200}, {"1", 200}, {"2", 200}, {"cpu", 1000}};
  EXPECT_THAT(BudgetsOf(ModelT(), Mode::kLowZero, memory),
              ElementsAre(Pair("0", 0), Pair("1", 72), Pair("2", 200), Pair("cpu", 1000)));
  EXPECT_EQ(MapOf(ModelT(), Mode::kLowZero, memory),
            "1: embed b0 b1 b2 b3 b4 | 2: b5 b6 b7 lm_head");
}

TEST(AccelerateGolden, Case9) {
  const Budgets memory = {{"0", 200}, {"1", 60}, {"2", 45}, {"cpu", 1000}};
  EXPECT_THAT(BudgetsOf(ModelT(), Mode::kLowZero, memory),
              ElementsAre(Pair("0", 15), Pair("1", 60), Pair("2", 45), Pair("cpu", 1000)));
  EXPECT_EQ(MapOf(ModelT(), Mode::kLowZero, memory),
            "1: embed b0 b1 b2 b3 | 2: b4 b5 b6 b7 | cpu: lm_head");
}

TEST(AccelerateGolden, Case10) {
  EXPECT_EQ(MapOf(ModelT(), Mode::kSequential, {{"0", 60}, {"cpu", 60}}),
            "0: embed b0 b1 | cpu: b2 b3 b4 b5 | disk: b6 b7 lm_head");
}

TEST(AccelerateGolden, Case11) {
  EXPECT_EQ(MapOf(ModelT(), Mode::kSequential, {{"0", 60}, {"cpu", 30}}),
            "0: embed b0 b1 | cpu: b2 | disk: b3 b4 b5 b6 b7 lm_head");
}

TEST(AccelerateGolden, Case12) {
  EXPECT_EQ(MapOf(ModelT(), Mode::kSequential, {{"0", 15}, {"1", 200}, {"cpu", 1000}}), "1: all");
  EXPECT_EQ(MapOf(ModelT(), Mode::kSequential, {{"0", 0}, {"1", 200}, {"cpu", 1000}}), "1: all");
}

TEST(AccelerateGolden, Case13) {
  const Budgets memory = {{"0", 35}, {"1", 200}, {"cpu", 1000}};
  EXPECT_EQ(MapOf(ModelT(), Mode::kSequential, memory), "1: all");
  RuleOptions fallback = Options();
  fallback.fallback_allocation = true;
  EXPECT_EQ(MapOf(ModelT(), Mode::kSequential, memory, fallback),
            "1: embed | 0: b0 | 1: b1 b2 b3 b4 b5 b6 b7 lm_head");
}

TEST(AccelerateGolden, Case14) {
  const Budgets memory = {{"0", 57}, {"1", 100}, {"cpu", 1000}};
  EXPECT_EQ(MapOf(ModelT(), Mode::kSequential, memory),
            "0: embed b0 | 1: b1 b2 b3 b4 b5 b6 b7 lm_head");
  EXPECT_EQ(MapOf(ModelT(), Mode::kSequential, memory, RuleOptions{}),
            "0: embed b0 b1.attn | 1: b1.mlp b2 b3 b4 b5 b6 b7 lm_head");
}

TEST(AccelerateGolden, Case15) {
  EXPECT_EQ(MapOf(ModelT(), Mode::kSequential, {{"0", 70}, {"1", 25}, {"2", 200}, {"cpu", 1000}}),
            "0: embed b0 b1 b2 | 1: b3 b4 | 2: b5 b6 b7 lm_head");
}

TEST(AccelerateGolden, Case16) {
  EXPECT_EQ(MapOf(ModelT(), Mode::kSequential, {{"0", 60}, {"1", 60}, {"cpu", 0}}),
            "0: embed b0 b1 | 1: b2 b3 b4 b5 b6 b7 | disk: lm_head");
}

TEST(AccelerateGolden, Case17) {
  EXPECT_EQ(MapOf(ModelT(/*tied=*/true), Mode::kSequential, {{"0", 60}, {"1", 100}, {"cpu", 1000}}),
            "0: embed b0 b1 b2 | 1: b3 b4 b5 b6 b7 | 0: lm_head");
}

TEST(AccelerateGolden, Case18) {
  const Budgets memory = {{"0", 200}, {"1", 200}, {"cpu", 1000}};
  EXPECT_THAT(BudgetsOf(ModelT(/*tied=*/true), Mode::kAuto, memory),
              ElementsAre(Pair("0", 62), Pair("1", 200), Pair("cpu", 1000)));
  EXPECT_EQ(MapOf(ModelT(/*tied=*/true), Mode::kAuto, memory),
            "0: embed b0 b1 b2 | 1: b3 b4 b5 b6 b7 | 0: lm_head");
}

TEST(AccelerateGolden, Case19) {
  const Budgets budgets =
      Times(BudgetsOf(ModelT(), Mode::kAuto, {{"0", 200}, {"1", 200}, {"cpu", 1000}}), 0.90);
  EXPECT_THAT(budgets, ElementsAre(Pair("0", ::testing::DoubleNear(64.8, 1e-9)), Pair("1", 180),
                                   Pair("cpu", 900)));
  EXPECT_EQ(Short(InferDeviceMap(ModelT(), budgets, Options())),
            "0: embed b0 b1 | 1: b2 b3 b4 b5 b6 b7 lm_head");
}

TEST(AccelerateGolden, Case20) {
  const Budgets memory = {{"0", 3000}, {"1", 3000}, {"2", 3000}, {"3", 3000}, {"cpu", 1000}};
  const Budgets budgets = BudgetsOf(ModelL(), Mode::kAuto, memory);
  EXPECT_THAT(budgets, ElementsAre(Pair("0", 1056), Pair("1", 1056), Pair("2", 1056),
                                   Pair("3", 3000), Pair("cpu", 1000)));
  auto first_of = [&](const Budgets& b) {
    std::string result;
    Device last;
    for (const auto& [name, device] : InferDeviceMap(ModelL(), b, Options())) {
      if (device != last) {
        absl::StrAppend(&result, result.empty() ? "" : " ", device, ":", name);
        last = device;
      }
    }
    return result;
  };
  EXPECT_EQ(first_of(budgets), "0:embed 1:b5 2:b15 3:b25");
  EXPECT_EQ(first_of(Times(budgets, 0.90)), "0:embed 1:b4 2:b13 3:b22");
}

TEST(AccelerateGolden, Case21) {
  const Budgets memory = {{"0", 200}, {"1", 200}, {"2", 200}, {"cpu", 1000}};
  EXPECT_THAT(BudgetsOf(ModelOpt(), Mode::kAuto, memory),
              ElementsAre(Pair("0", 46), Pair("1", 46), Pair("2", 200), Pair("cpu", 1000)));
  EXPECT_EQ(MapOf(ModelOpt(), Mode::kAuto, memory),
            "0: embed pos final_layer_norm b0 | 1: b1 b2 b3 b4 | 2: b5 b6 b7 | 0: lm_head");
}

TEST(AccelerateRules, BuffersCountAndAreLostWhenTheirModuleIsSplit) {
  Module root{"", "Model", {}, {}, {}};
  Module part{"part", "Part", {{"scale", 1, ""}}, {{"table", 5, ""}}, {}};
  part.children = {Leaf("a", 10), Leaf("b", 10)};
  root.children.push_back(part);
  EXPECT_EQ(ModelT().children.size(), 10u);
  EXPECT_EQ(ModuleSizes(root).at("part"), 26u);
  const Map map = InferDeviceMap(root, {{"0", 20}, {"1", 30}}, RuleOptions{});
  EXPECT_EQ(Short(map), "0: part.scale | 1: part.a part.b");
}

TEST(AccelerateRules, TransformersAddsTheLargestLeafInstead) {
  RuleOptions options = Options();
  options.rules = HfRules::kTransformers;
  const Budgets budgets =
      *BalancedMemory(ModelT(), {{"0", 200}, {"1", 200}}, options, /*low_zero=*/false);
  EXPECT_THAT(budgets, ElementsAre(Pair("0", 85), Pair("1", 200)));
}

TEST(AccelerateRules, LowZeroNeedsNumbersWithoutGaps) {
  auto budgets = BalancedMemory(ModelT(), {{"0", 200}, {"2", 200}}, Options(), /*low_zero=*/true);
  EXPECT_EQ(budgets.status().code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace sluice::plan
