// Maps of OPT-6.7B and Llama-2-7B in fp16, AWQ, GPTQ and bitsandbytes form, made by accelerate and
// transformers on empty weights (tests/testdata/plan/make_maps.py), against --hf-compat.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <map>
#include <nlohmann/json.hpp>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "services/plan/device_map.h"

namespace sluice::plan {
namespace {

using internal::v1::PlanShardsResponse;
using Json = nlohmann::json;
using Map = std::map<std::string, Device>;

constexpr int kLayers = 32;

const Json& Golden() {
  static const Json* golden = [] {
    std::ifstream file(SLUICE_TESTDATA "/plan/maps.json");
    return new Json(Json::parse(file));
  }();
  return *golden;
}

void AddSource(PlanShardsResponse& model, const Json& tensor, int layer) {
  std::string name = tensor[0];
  if (const size_t at = name.find(".layers.0."); at != std::string::npos) {
    name.replace(at, 10, absl::StrCat(".layers.", layer, "."));
  }
  const std::string dtype = tensor[1];
  uint64_t bytes = dtype == "U8" ? 1 : dtype == "F16" ? 2 : 4;
  auto* source = model.add_source_tensors();
  for (const uint64_t size : tensor[2]) {
    source->add_shape(size);
    bytes *= size;
  }
  source->set_name(name);
  source->set_dtype(dtype);
  source->set_bytes(bytes);
}

PlanShardsResponse Describe(const std::string& name, const std::string& form) {
  PlanShardsResponse model;
  const bool opt = absl::StartsWith(name, "opt");
  auto* config = model.mutable_config();
  config->set_architecture(opt ? internal::v1::ARCHITECTURE_OPT : internal::v1::ARCHITECTURE_LLAMA);
  config->set_num_layers(kLayers);
  config->set_hidden_size(4096);
  config->set_num_heads(32);
  config->set_num_kv_heads(32);
  config->set_head_dim(128);
  config->set_has_final_norm(true);
  config->set_tie_word_embeddings(opt);
  model.mutable_quant()->set_method(form == "bnb4"   ? "bitsandbytes"
                                    : form == "fp16" ? "none"
                                                     : form);
  const Json& checkpoint = Golden()["checkpoints"][name + "/" + form];
  for (const Json& tensor : checkpoint["outside"]) {
    AddSource(model, tensor, 0);
  }
  for (int layer = 0; layer < kLayers; ++layer) {
    for (const Json& tensor : checkpoint["layer"]) {
      AddSource(model, tensor, layer);
    }
  }
  return model;
}

// {"model.layers.0-3": "0"} -> four entries.
Map Expand(const Json& compact) {
  Map map;
  for (const auto& [key, device] : compact.items()) {
    const size_t dash = key.rfind('-');
    if (dash == std::string::npos) {
      map[key] = device;
      continue;
    }
    const size_t dot = key.rfind('.');
    const int first = std::stoi(key.substr(dot + 1, dash - dot - 1));
    for (int i = first; i <= std::stoi(key.substr(dash + 1)); ++i) {
      map[absl::StrCat(key.substr(0, dot + 1), i)] = device;
    }
  }
  return map;
}

std::string Title(const Json& c) {
  std::vector<std::string> parts;
  for (const char* key : {"model", "form", "mode", "max_memory"}) {
    parts.push_back(c[key]);
  }
  return absl::StrJoin(parts, " ");
}

int CompareAll(PlanOptions::HfRules rules, const std::string& key) {
  int compared = 0;
  std::map<std::string, PlanShardsResponse> models;
  for (const Json& c : Golden()["cases"]) {
    const std::string name = c["model"];
    const std::string form = c["form"];
    auto& model = models[name + form];
    if (model.source_tensors().empty()) {
      model = Describe(name, form);
    }
    PlanOptions options;
    options.hf_compat = true;
    options.hf_rules = rules;
    options.mode = *ParseMapMode(c["mode"]);
    auto plan = PlanDeviceMap(model, *ParseMaxMemory(c["max_memory"]), options);
    if (!plan.ok()) {
      ADD_FAILURE() << Title(c) << ": " << plan.status().ToString();
      continue;
    }
    const Map map(plan->hf_device_map.begin(), plan->hf_device_map.end());
    EXPECT_EQ(map, Expand(c.contains(key) ? c[key] : c["accelerate"])) << Title(c);
    if (c.contains("refused") && form == "bnb4" && rules == PlanOptions::HfRules::kTransformers) {
      EXPECT_THAT(absl::StrJoin(plan->notes, "\n"), ::testing::HasSubstr("transformers refuses"))
          << Title(c);
    }
    ++compared;
  }
  return compared;
}

TEST(RealModels, AccelerateMapsAreEqual) {
  EXPECT_EQ(CompareAll(PlanOptions::HfRules::kAccelerate, "accelerate"), 240);
}

TEST(RealModels, TransformersMapsAreEqual) {
  EXPECT_EQ(CompareAll(PlanOptions::HfRules::kTransformers, "transformers"), 240);
}

TEST(RealModels, TheTwoRulesDiffer) {
  int differ = 0;
  for (const Json& c : Golden()["cases"]) {
    differ += c.contains("transformers") ? 1 : 0;
  }
  EXPECT_GT(differ, 10);
}

TEST(RealModels, OptGoesBackToTheFirstDeviceAndAPipelineSaysSo) {
  PlanOptions options;
  options.hf_compat = true;
  auto plan =
      PlanDeviceMap(Describe("opt-6.7b", "fp16"), *ParseMaxMemory("0=10GiB,1=10GiB"), options);
  ASSERT_TRUE(plan.ok());
  EXPECT_TRUE(plan->stages.empty());
  EXPECT_THAT(absl::StrJoin(plan->notes, "\n"),
              ::testing::HasSubstr("lm_head is with the last layer on device 1, not on 0"));
}

TEST(RealModels, StagesAreFilledWhenAPipelineCanFollow) {
  PlanOptions options;
  options.hf_compat = true;
  auto plan =
      PlanDeviceMap(Describe("llama-2-7b", "fp16"), *ParseMaxMemory("0=10GiB,1=10GiB"), options);
  ASSERT_TRUE(plan.ok());
  ASSERT_EQ(plan->stages.size(), 2u);
  EXPECT_EQ(plan->stages[1].layer_end, 32u);
  EXPECT_EQ(plan->num_blocks, 0u);
  uint64_t total = 0;
  for (const StagePlan& stage : plan->stages) {
    total += stage.weight_bytes;
  }
  EXPECT_EQ(total,
            2ull * 6738415616 + 512);  // Parameters of Llama-2-7B in fp16, and two rotary buffers
}

}  // namespace
}  // namespace sluice::plan
