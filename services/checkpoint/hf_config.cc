#include "services/checkpoint/hf_config.h"

#include <cmath>
#include <string>

#include "absl/strings/str_cat.h"
#include "kernels/core/status_macros.h"

namespace sluice::checkpoint {
namespace {

using internal::v1::ModelConfig;
using internal::v1::RopeConfig;

constexpr uint64_t kMaxLayers = 1'000;
constexpr uint64_t kMaxWidth = 1 << 17;
constexpr uint64_t kMaxVocab = 1 << 21;
constexpr uint64_t kMaxPositions = 1 << 24;
constexpr uint64_t kMaxHeads = 1 << 12;
constexpr uint64_t kMaxIntermediate = 1 << 20;
constexpr char kFile[] = "config.json";

absl::Status Unsupported(const std::string& what, const std::string& way_out) {
  return absl::UnimplementedError(absl::StrCat(kFile, ": ", what, " is not supported; ", way_out));
}

absl::Status SetActivation(const std::string& name, ModelConfig* config) {
  if (name == "relu") {
    config->set_activation(internal::v1::MLP_ACTIVATION_RELU);
  } else if (name == "silu" || name == "swish") {
    config->set_activation(internal::v1::MLP_ACTIVATION_SILU);
  } else if (name == "gelu") {
    config->set_activation(internal::v1::MLP_ACTIVATION_GELU);
  } else if (name == "gelu_new" || name == "gelu_pytorch_tanh") {
    config->set_activation(internal::v1::MLP_ACTIVATION_GELU_TANH);
  } else {
    return Unsupported(absl::StrCat("activation \"", name, "\""),
                       "known are relu, silu, gelu, gelu_new and gelu_pytorch_tanh");
  }
  return absl::OkStatus();
}

// One id, a list of ids, or none.
void ReadTokenIds(const Json& object, const char* key, JsonFields* fields,
                  std::vector<uint32_t>* out) {
  const auto it = object.find(key);
  if (it == object.end() || it->is_null()) return;
  const Json list = it->is_array() ? *it : Json::array({*it});
  for (const Json& value : list) {
    // -1 is how some files say "none".
    if (value.is_number_integer() && value == -1) continue;
    uint64_t id = 0;
    if (!AsUint(value, &id) || id >= kMaxVocab || out->size() >= 64) {
      fields->Fail(key, "must be a token id or a list of at most 64 token ids");
      return;
    }
    out->push_back(static_cast<uint32_t>(id));
  }
}

// generation_config.json is what generation follows; config.json where it says nothing; then the
// class's default, 2.
absl::Status SetSpecialTokens(const Json& json, const Json& generation, uint32_t default_bos,
                              ModelConfig* config) {
  const Json empty = Json::object();
  const Json& gen = generation.is_object() ? generation : empty;
  JsonFields gen_fields(gen, "generation_config.json");
  JsonFields fields(json, kFile);
  for (const char* key : {"eos_token_id", "bos_token_id"}) {
    std::vector<uint32_t> ids;
    ReadTokenIds(gen, key, &gen_fields, &ids);
    if (ids.empty()) ReadTokenIds(json, key, &fields, &ids);
    const bool absent = !gen.contains(key) && !json.contains(key);
    if (key[0] == 'e') {
      if (absent && config->vocab_size() > 2) ids = {2};
      for (const uint32_t id : ids) config->add_eos_token_ids(id);
    } else {
      if (absent && config->vocab_size() > default_bos) ids = {default_bos};
      if (!ids.empty()) config->set_bos_token_id(ids[0]);
    }
  }
  SLUICE_RETURN_IF_ERROR(gen_fields.status());
  return fields.status();
}

absl::Status SetDtype(const Json& json, ModelConfig* config) {
  JsonFields fields(json, kFile);
  std::string dtype = fields.TextOr("dtype", "");
  if (dtype.empty()) dtype = fields.TextOr("torch_dtype", "");
  SLUICE_RETURN_IF_ERROR(fields.status());
  if (dtype.rfind("torch.", 0) == 0) dtype = dtype.substr(6);
  if (dtype == "auto") dtype.clear();
  if (!dtype.empty() && dtype != "float16" && dtype != "bfloat16" && dtype != "float32") {
    return Unsupported(absl::StrCat("dtype \"", dtype, "\""),
                       "save the model as float16, bfloat16 or float32");
  }
  config->set_dtype(dtype);
  return absl::OkStatus();
}

absl::Status SetRopeScaling(JsonFields* scaling, uint64_t max_positions, RopeConfig* rope) {
  std::string type = scaling->TextOr("rope_type", "");
  if (type.empty()) type = scaling->TextOr("type", "default");
  rope->set_type(type);
  SLUICE_RETURN_IF_ERROR(scaling->status());
  if (type == "default") return absl::OkStatus();
  if (type != "linear" && type != "dynamic" && type != "llama3") {
    return Unsupported(absl::StrCat("rope type \"", type, "\""),
                       "known are default, linear, dynamic and llama3");
  }
  if (!scaling->Has("factor")) scaling->Fail("factor", "is missing");
  rope->set_factor(scaling->DoubleOr("factor", 1e-6, 1e6, 1));
  if (type == "dynamic") {
    rope->set_original_max_position_embeddings(static_cast<uint32_t>(
        scaling->UintOr("original_max_position_embeddings", 1, kMaxPositions, max_positions)));
  }
  if (type == "llama3") {
    rope->set_low_freq_factor(scaling->DoubleOr("low_freq_factor", 1e-6, 1e6, 1));
    rope->set_high_freq_factor(scaling->DoubleOr("high_freq_factor", 1e-6, 1e6, 4));
    rope->set_original_max_position_embeddings(static_cast<uint32_t>(
        scaling->UintOr("original_max_position_embeddings", 1, kMaxPositions, 8192)));
    for (const char* key :
         {"low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}) {
      if (!scaling->Has(key)) scaling->Fail(key, "is missing");
    }
    if (rope->high_freq_factor() <= rope->low_freq_factor()) {
      scaling->Fail("high_freq_factor", "must be above low_freq_factor");
    }
  }
  return scaling->status();
}

absl::Status SetRope(const Json& json, ModelConfig* config) {
  JsonFields fields(json, kFile);
  RopeConfig* rope = config->mutable_rope();
  rope->set_factor(1);
  rope->set_type("default");
  rope->set_theta(fields.DoubleOr("rope_theta", 1, 1e12, 10000));
  Json parameters = fields.ObjectOr("rope_parameters");
  if (parameters.is_null()) parameters = fields.ObjectOr("rope_scaling");
  const double partial = fields.DoubleOr("partial_rotary_factor", 0, 1, 1);
  SLUICE_RETURN_IF_ERROR(fields.status());
  if (!parameters.is_null()) {
    JsonFields scaling(parameters, absl::StrCat(kFile, ": rope parameters"));
    rope->set_theta(scaling.DoubleOr("rope_theta", 1, 1e12, rope->theta()));
    SLUICE_RETURN_IF_ERROR(SetRopeScaling(&scaling, config->max_position_embeddings(), rope));
    if (scaling.DoubleOr("partial_rotary_factor", 0, 1, 1) != 1) {
      return Unsupported("partial_rotary_factor below 1", "use a Llama model");
    }
  }
  if (partial != 1) return Unsupported("partial_rotary_factor below 1", "use a Llama model");
  return absl::OkStatus();
}

absl::StatusOr<ModelConfig> ParseLlama(const Json& json) {
  JsonFields fields(json, kFile);
  ModelConfig config;
  config.set_architecture(internal::v1::ARCHITECTURE_LLAMA);
  config.set_num_layers(fields.Uint("num_hidden_layers", 1, kMaxLayers));
  config.set_hidden_size(fields.Uint("hidden_size", 1, kMaxWidth));
  config.set_intermediate_size(fields.Uint("intermediate_size", 1, kMaxIntermediate));
  config.set_num_heads(fields.Uint("num_attention_heads", 1, kMaxHeads));
  config.set_num_kv_heads(fields.UintOr("num_key_value_heads", 1, kMaxHeads, config.num_heads()));
  if (!fields.Has("head_dim") && config.hidden_size() % config.num_heads() != 0) {
    fields.Fail("hidden_size", "must be a multiple of num_attention_heads");
  }
  config.set_head_dim(
      fields.UintOr("head_dim", 1, kMaxWidth, config.hidden_size() / config.num_heads()));
  config.set_vocab_size(fields.Uint("vocab_size", 1, kMaxVocab));
  config.set_max_position_embeddings(
      fields.UintOr("max_position_embeddings", 1, kMaxPositions, 2048));
  config.set_norm_eps(static_cast<float>(fields.DoubleOr("rms_norm_eps", 0, 1, 1e-6)));
  config.set_tie_word_embeddings(fields.BoolOr("tie_word_embeddings", false));
  config.set_attention_bias(fields.BoolOr("attention_bias", false));
  config.set_mlp_bias(fields.BoolOr("mlp_bias", false));
  config.set_has_final_norm(true);
  config.set_norm_before(true);
  config.set_norm_affine(true);
  config.set_word_embed_dim(config.hidden_size());
  const std::string activation = fields.TextOr("hidden_act", "silu");
  SLUICE_RETURN_IF_ERROR(fields.status());
  SLUICE_RETURN_IF_ERROR(SetActivation(activation, &config));
  SLUICE_RETURN_IF_ERROR(SetRope(json, &config));
  return config;
}

absl::StatusOr<ModelConfig> ParseOpt(const Json& json) {
  JsonFields fields(json, kFile);
  ModelConfig config;
  config.set_architecture(internal::v1::ARCHITECTURE_OPT);
  config.set_num_layers(fields.Uint("num_hidden_layers", 1, kMaxLayers));
  config.set_hidden_size(fields.Uint("hidden_size", 1, kMaxWidth));
  config.set_intermediate_size(fields.Uint("ffn_dim", 1, kMaxIntermediate));
  config.set_num_heads(fields.Uint("num_attention_heads", 1, kMaxHeads));
  config.set_num_kv_heads(config.num_heads());
  if (config.hidden_size() % config.num_heads() != 0) {
    fields.Fail("hidden_size", "must be a multiple of num_attention_heads");
  }
  config.set_head_dim(config.hidden_size() / config.num_heads());
  config.set_vocab_size(fields.Uint("vocab_size", 1, kMaxVocab));
  config.set_max_position_embeddings(
      fields.UintOr("max_position_embeddings", 1, kMaxPositions, 2048));
  config.set_norm_eps(1e-5F);  // torch's default; OPT configs do not hold it.
  config.set_tie_word_embeddings(fields.BoolOr("tie_word_embeddings", true));
  const bool bias = fields.BoolOr("enable_bias", true);
  config.set_attention_bias(bias);
  config.set_mlp_bias(bias);
  config.set_norm_before(fields.BoolOr("do_layer_norm_before", true));
  config.set_has_final_norm(config.norm_before() &&
                            !fields.BoolOr("_remove_final_layer_norm", false));
  config.set_norm_affine(fields.BoolOr("layer_norm_elementwise_affine", true));
  config.set_word_embed_dim(
      fields.UintOr("word_embed_proj_dim", 1, kMaxWidth, config.hidden_size()));
  const std::string activation = fields.TextOr("activation_function", "relu");
  SLUICE_RETURN_IF_ERROR(fields.status());
  SLUICE_RETURN_IF_ERROR(SetActivation(activation, &config));
  return config;
}

}  // namespace

absl::StatusOr<ModelConfig> ParseHfConfig(const Json& json, const Json& generation) {
  JsonFields fields(json, kFile);
  const std::string type = fields.TextOr("model_type", "");
  SLUICE_RETURN_IF_ERROR(fields.status());
  if (type.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat(kFile, ": model_type is missing; it must be \"llama\" or \"opt\""));
  }
  absl::StatusOr<ModelConfig> config = Unsupported(
      absl::StrCat("model_type \"", type.substr(0, 100), "\""), "use a model of type llama or opt");
  if (type == "llama") config = ParseLlama(json);
  if (type == "opt") config = ParseOpt(json);
  if (!config.ok()) return config;
  config->set_model_type(type);
  const uint32_t default_bos = type == "opt" ? 2 : 1;
  SLUICE_RETURN_IF_ERROR(SetSpecialTokens(json, generation, default_bos, &*config));
  SLUICE_RETURN_IF_ERROR(SetDtype(json, &*config));
  SLUICE_RETURN_IF_ERROR(CheckModelConfig(*config, kFile));
  return config;
}

absl::Status CheckModelConfig(const ModelConfig& config, const std::string& file) {
  const auto bad = [&file](const std::string& rule) {
    return absl::InvalidArgumentError(
        absl::StrCat(file, ": ", rule, "; correct it, or download the file again"));
  };
  const auto within = [](uint64_t value, uint64_t limit) { return value >= 1 && value <= limit; };
  if (!within(config.num_layers(), kMaxLayers)) return bad("layers must be 1 to 1000");
  if (!within(config.hidden_size(), kMaxWidth)) return bad("hidden size must be 1 to 2^17");
  if (!within(config.intermediate_size(), kMaxIntermediate)) {
    return bad("intermediate size must be 1 to 2^20");
  }
  if (!within(config.vocab_size(), kMaxVocab)) return bad("vocabulary must be 1 to 2^21");
  if (!within(config.num_heads(), kMaxHeads) || !within(config.num_kv_heads(), kMaxHeads) ||
      config.num_heads() % config.num_kv_heads() != 0) {
    return bad(absl::StrCat("key/value heads (", config.num_kv_heads(), ") must divide heads (",
                            config.num_heads(), ")"));
  }
  if (!within(uint64_t{config.head_dim()} * config.num_heads(), kMaxWidth)) {
    return bad("heads times head size must be 1 to 2^17");
  }
  if (config.has_rope() && config.head_dim() % 2 != 0) {
    return bad("head size must be even for rotary embedding");
  }
  if (!within(config.max_position_embeddings(), kMaxPositions)) {
    return bad("context length must be 1 to 2^24");
  }
  if (!(config.norm_eps() >= 0 && config.norm_eps() <= 1))
    return bad("norm epsilon must be 0 to 1");
  for (const uint32_t id : config.eos_token_ids()) {
    if (id >= config.vocab_size()) {
      return bad(
          absl::StrCat("eos_token_id ", id, " is not below vocab_size ", config.vocab_size()));
    }
  }
  if (config.has_bos_token_id() && config.bos_token_id() >= config.vocab_size()) {
    return bad(absl::StrCat("bos_token_id ", config.bos_token_id(), " is not below vocab_size ",
                            config.vocab_size()));
  }
  return absl::OkStatus();
}

}  // namespace sluice::checkpoint
