#include "services/checkpoint/hf_config.h"

#include "services/checkpoint/layout.h"
#include "tests/services/checkpoint/checkpoint_builder.h"
#include "tests/services/checkpoint/fails.h"

namespace sluice::checkpoint {
namespace {

using internal::v1::ModelConfig;

absl::StatusOr<ModelConfig> Parse(const Json& config, const Json& generation = nullptr) {
  return ParseHfConfig(config, generation);
}

Json Llama() { return TinyModel::Llama().config; }

TEST(HfConfigTest, ReadsLlama2AsTransformers4WritesIt) {
  const Json json = Json::parse(R"({
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 4096,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null,
    "tie_word_embeddings": false, "torch_dtype": "float16", "use_cache": true, "vocab_size": 32000})");
  const absl::StatusOr<ModelConfig> config = Parse(json);
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->architecture(), internal::v1::ARCHITECTURE_LLAMA);
  EXPECT_EQ(config->head_dim(), 128U);
  EXPECT_EQ(config->rope().theta(), 10000);
  EXPECT_EQ(config->rope().type(), "default");
  EXPECT_EQ(config->dtype(), "float16");
  EXPECT_EQ(config->eos_token_ids_size(), 1);
  EXPECT_EQ(config->eos_token_ids(0), 2U);
  EXPECT_EQ(config->bos_token_id(), 1U);
  EXPECT_FLOAT_EQ(config->norm_eps(), 1e-5F);
}

TEST(HfConfigTest, ReadsLlama3AsTransformers5WritesIt) {
  Json json = Llama();
  json.erase("torch_dtype");
  json["dtype"] = "bfloat16";
  json["head_dim"] = 64;
  json["vocab_size"] = 128256;
  json["rope_parameters"] = {{"rope_type", "llama3"},   {"rope_theta", 500000.0},
                             {"factor", 8.0},           {"low_freq_factor", 1.0},
                             {"high_freq_factor", 4.0}, {"original_max_position_embeddings", 8192}};
  const Json generation = {{"eos_token_id", {128001, 128008, 128009}}, {"bos_token_id", 128000}};
  const absl::StatusOr<ModelConfig> config = Parse(json, generation);
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->dtype(), "bfloat16");
  EXPECT_EQ(config->head_dim(), 64U);
  EXPECT_EQ(config->num_kv_heads(), 1U);
  EXPECT_EQ(config->rope().type(), "llama3");
  EXPECT_EQ(config->rope().theta(), 500000);
  EXPECT_EQ(config->rope().factor(), 8);
  EXPECT_EQ(config->rope().original_max_position_embeddings(), 8192U);
  EXPECT_EQ(config->eos_token_ids_size(), 3);
  EXPECT_EQ(config->bos_token_id(), 128000U);
}

TEST(HfConfigTest, ReadsRopeScalingOfVersion4) {
  Json json = Llama();
  json["rope_theta"] = 1e6;
  json["rope_scaling"] = {{"type", "linear"}, {"factor", 4.0}};
  EXPECT_EQ(Parse(json)->rope().type(), "linear");
  EXPECT_EQ(Parse(json)->rope().theta(), 1e6);
  json["rope_scaling"] = {{"type", "dynamic"}, {"factor", 2.0}};
  EXPECT_EQ(Parse(json)->rope().original_max_position_embeddings(), 2048U);
  json["rope_scaling"] = {{"rope_type", "yarn"}, {"factor", 2.0}};
  EXPECT_TRUE(Unsupported(Parse(json).status(), {"yarn", "llama3"}));
  json["rope_scaling"] = {{"rope_type", "llama3"}, {"factor", 2.0}};
  EXPECT_TRUE(Invalid(Parse(json).status(), {"low_freq_factor is missing"}));
  json["rope_scaling"] = {{"rope_type", "linear"}};
  EXPECT_TRUE(Invalid(Parse(json).status(), {"factor is missing"}));
}

TEST(HfConfigTest, ReadsOpt125mAnd350m) {
  Json json = Json::parse(
      R"({"model_type": "opt", "hidden_size": 768, "ffn_dim": 3072, "num_attention_heads": 12,
    "num_hidden_layers": 12, "vocab_size": 50272, "max_position_embeddings": 2048, "word_embed_proj_dim": 768,
    "do_layer_norm_before": true, "activation_function": "relu", "torch_dtype": "float16", "prefix": "</s>"})");
  absl::StatusOr<ModelConfig> config = Parse(json);
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_TRUE(config->tie_word_embeddings());
  EXPECT_TRUE(config->has_final_norm());
  EXPECT_TRUE(config->attention_bias());
  EXPECT_EQ(config->activation(), internal::v1::MLP_ACTIVATION_RELU);
  EXPECT_EQ(config->eos_token_ids(0), 2U);
  EXPECT_EQ(config->bos_token_id(), 2U);
  EXPECT_FALSE(config->has_rope());
  json["hidden_size"] = 1024;
  json["num_attention_heads"] = 16;
  json["word_embed_proj_dim"] = 512;
  json["do_layer_norm_before"] = false;
  config = Parse(json);
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_FALSE(config->norm_before());
  EXPECT_FALSE(config->has_final_norm());
  std::vector<std::string> names;
  for (const ExpectedTensor& tensor : ExpectedTensors(*config)) names.push_back(tensor.name);
  EXPECT_EQ(names[2], "project_in.weight");
  EXPECT_EQ(names.back(), "project_out.weight");
}

TEST(HfConfigTest, EosMayBeAbsentNullOrMinusOne) {
  Json json = Llama();
  json["eos_token_id"] = nullptr;
  EXPECT_EQ(Parse(json)->eos_token_ids_size(), 0);
  json["eos_token_id"] = -1;
  EXPECT_EQ(Parse(json)->eos_token_ids_size(), 0);
  json["bos_token_id"] = nullptr;
  EXPECT_FALSE(Parse(json)->has_bos_token_id());
  json["eos_token_id"] = "2";
  EXPECT_TRUE(Invalid(Parse(json).status(), {"eos_token_id"}));
  json["eos_token_id"] = {2, -5};
  EXPECT_TRUE(Invalid(Parse(json).status(), {"eos_token_id"}));
}

TEST(HfConfigTest, RefusesOtherModelsByName) {
  Json json = Llama();
  json["model_type"] = "mixtral";
  EXPECT_TRUE(Unsupported(Parse(json).status(), {"mixtral", "llama or opt"}));
  json.erase("model_type");
  EXPECT_TRUE(Invalid(Parse(json).status(), {"model_type is missing"}));
  json = Llama();
  json["hidden_act"] = "xielu";
  EXPECT_TRUE(Unsupported(Parse(json).status(), {"xielu"}));
  json = Llama();
  json["torch_dtype"] = "float8_e4m3fn";
  EXPECT_TRUE(Unsupported(Parse(json).status(), {"float8_e4m3fn"}));
  json = Llama();
  json["partial_rotary_factor"] = 0.5;
  EXPECT_TRUE(Unsupported(Parse(json).status(), {"partial_rotary_factor"}));
}

// F16, F17
TEST(HfConfigTest, RefusesAbsurdNumbers) {
  const struct {
    const char* key;
    const char* values;
  } kCases[] = {{"num_hidden_layers", "[0, 1001, 1000000000, -1, \"32\", 1.5, null]"},
                {"hidden_size", "[0, 131073, 33, 4294967297]"},
                {"vocab_size", "[0, 2097153, -8]"},
                {"num_attention_heads", "[0, 3, 4097]"},
                {"num_key_value_heads", "[0, 3]"},
                {"intermediate_size", "[0, 1048577]"},
                {"head_dim", "[0, 15, 131073]"},
                {"rms_norm_eps", "[-1, 2, \"x\"]"},
                {"rope_theta", "[0, -1, 1e300]"},
                {"tie_word_embeddings", "[1, \"true\"]"}};
  for (const auto& test : kCases) {
    for (const Json& value : Json::parse(test.values)) {
      Json json = Llama();
      json[test.key] = value;
      EXPECT_TRUE(Invalid(Parse(json).status(), {"config.json"})) << test.key << " " << value;
    }
  }
}

TEST(LayoutTest, NamesAndShapesOfLlama) {
  Json json = Llama();
  json["tie_word_embeddings"] = false;
  json["attention_bias"] = true;
  const ModelConfig config = *Parse(json);
  const std::vector<ExpectedTensor> tensors = ExpectedTensors(config);
  EXPECT_EQ(tensors.front().name, "embed_tokens.weight");
  EXPECT_EQ(tensors.back().name, "lm_head.weight");
  EXPECT_EQ(tensors[tensors.size() - 2].name, "norm.weight");
  EXPECT_EQ(tensors[2].name, "layers.0.self_attn.q_proj.weight");
  EXPECT_EQ(tensors[3].name, "layers.0.self_attn.q_proj.bias");
  EXPECT_EQ(tensors[4].n, 16);  // One kv head of 16.
  EXPECT_EQ(HfName(config, "layers.0.mlp.up_proj.weight"), "model.layers.0.mlp.up_proj.weight");
  EXPECT_EQ(HfName(config, "lm_head.weight"), "lm_head.weight");
}

}  // namespace
}  // namespace sluice::checkpoint
