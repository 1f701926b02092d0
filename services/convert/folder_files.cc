#include "services/convert/folder_files.h"

#include <charconv>
#include <cstdlib>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/core/status_macros.h"
#include "services/checkpoint/json.h"
#include "services/text/tokenizer.h"

#ifndef SLUICE_VERSION
#define SLUICE_VERSION "unknown"
#endif

namespace sluice::convert {
namespace {

using checkpoint::Json;
using internal::v1::ModelConfig;

constexpr char kGgufVocabulary[] = "gguf_vocab.json";

// Keys as transformers and the libraries themselves write them.
Json GptqConfig(const ConvertOptions& options) {
  const bool symmetric = options.symmetric;
  return {{"quant_method", "gptq"},
          {"bits", 4},
          {"group_size", options.group_size},
          {"desc_act", false},
          {"static_groups", false},
          {"sym", symmetric},
          {"lm_head", false},
          {"damp_percent", 0.01},
          {"true_sequential", true},
          {"pack_dtype", "int32"},
          {"checkpoint_format", symmetric ? "gptq" : "gptq_v2"},
          {"meta", {{"quantizer", {absl::StrCat("sluice:", SLUICE_VERSION)}}}}};
}

Json AwqConfig(const ConvertOptions& options, const ModelConfig& model) {
  Json plain = nullptr;  // lm_head is left out by default
  if (model.word_embed_dim() != model.hidden_size()) {
    plain = {"lm_head", "project_in", "project_out"};
  }
  return {{"quant_method", "awq"}, {"bits", 4},         {"group_size", options.group_size},
          {"zero_point", true},    {"version", "gemm"}, {"modules_to_not_convert", plain}};
}

Json BnbConfig(const ConvertOptions& options) {
  return {{"quant_method", "bitsandbytes"},
          {"load_in_4bit", true},
          {"load_in_8bit", false},
          {"_load_in_4bit", true},
          {"_load_in_8bit", false},
          {"bnb_4bit_quant_type", NameOf(options.format)},
          {"bnb_4bit_use_double_quant", options.double_quant},
          {"bnb_4bit_compute_dtype", "float16"},
          {"bnb_4bit_quant_storage", "uint8"},
          {"llm_int8_skip_modules", nullptr},
          {"llm_int8_threshold", 6.0},
          {"llm_int8_enable_fp32_cpu_offload", false},
          {"llm_int8_has_fp16_weight", false}};
}

// Null for an unquantized folder.
Json QuantizationConfig(const ConvertOptions& options, const ModelConfig& model) {
  switch (options.format) {
    case Format::kGptq:
      return GptqConfig(options);
    case Format::kAwq:
      return AwqConfig(options, model);
    case Format::kNf4:
    case Format::kFp4:
      return BnbConfig(options);
    default:
      return nullptr;
  }
}

const char* DTypeName(Format format) {
  return format == Format::kFloat32    ? "float32"
         : format == Format::kBFloat16 ? "bfloat16"
                                       : "float16";
}

// The shortest decimal that is this float: 1e-05, not 9.999999747378752e-06.
double Shortest(float value) {
  char text[32] = {};
  std::to_chars(text, text + sizeof(text) - 1, value);
  return std::strtod(text, nullptr);
}

Json RopeScaling(const internal::v1::RopeConfig& rope) {
  if (rope.type() == "default") return nullptr;
  Json scaling = {{"rope_type", rope.type()}, {"factor", rope.factor()}};
  if (rope.type() == "llama3") {
    scaling["low_freq_factor"] = rope.low_freq_factor();
    scaling["high_freq_factor"] = rope.high_freq_factor();
    scaling["original_max_position_embeddings"] = rope.original_max_position_embeddings();
  }
  return scaling;
}

// config.json of a Llama in a GGUF file.
Json GgufConfig(const ModelConfig& config) {
  return {{"model_type", "llama"},
          {"hidden_size", config.hidden_size()},
          {"intermediate_size", config.intermediate_size()},
          {"num_hidden_layers", config.num_layers()},
          {"num_attention_heads", config.num_heads()},
          {"num_key_value_heads", config.num_kv_heads()},
          {"head_dim", config.head_dim()},
          {"vocab_size", config.vocab_size()},
          {"max_position_embeddings", config.max_position_embeddings()},
          {"rms_norm_eps", Shortest(config.norm_eps())},
          {"rope_theta", config.rope().theta()},
          {"rope_scaling", RopeScaling(config.rope())},
          {"hidden_act", "silu"},
          {"attention_bias", config.attention_bias()},
          {"mlp_bias", config.mlp_bias()},
          {"tie_word_embeddings", config.tie_word_embeddings()},
          {"use_cache", true}};
}

// bos, eos (one id, or a list) and pad, for config.json and generation_config.json.
void SetTokenIds(const ModelConfig& config, const Json& vocabulary, Json* out) {
  if (config.has_bos_token_id()) (*out)["bos_token_id"] = config.bos_token_id();
  if (config.eos_token_ids_size() == 1) {
    (*out)["eos_token_id"] = config.eos_token_ids(0);
  } else if (config.eos_token_ids_size() > 1) {
    (*out)["eos_token_id"] =
        std::vector<uint32_t>(config.eos_token_ids().begin(), config.eos_token_ids().end());
  }
  if (vocabulary.contains("padding_token_id")) {
    (*out)["pad_token_id"] = vocabulary["padding_token_id"];
  }
}

// tokenizer_config.json from the vocabulary of a GGUF file.
Json TokenizerConfig(const ModelConfig& config, const Json& vocabulary) {
  Json out = {{"tokenizer_class", "PreTrainedTokenizerFast"},
              {"model_max_length", config.max_position_embeddings()},
              {"clean_up_tokenization_spaces", false}};
  for (const auto& [id_key, key] :
       {std::pair("bos_token_id", "bos_token"), std::pair("eos_token_id", "eos_token"),
        std::pair("unknown_token_id", "unk_token"), std::pair("padding_token_id", "pad_token")}) {
    uint64_t id = 0;
    const Json& tokens = vocabulary["tokens"];
    if (vocabulary.contains(id_key) && checkpoint::AsUint(vocabulary[id_key], &id) &&
        id < tokens.size()) {
      out[key] = tokens[id];
    }
  }
  if (vocabulary.contains("chat_template")) out["chat_template"] = vocabulary["chat_template"];
  return out;
}

absl::Status AddGgufFiles(const checkpoint::Checkpoint& source, Json* config,
                          std::map<std::string, std::string>* files) {
  const ModelConfig& model = source.description().config();
  SLUICE_ASSIGN_OR_RETURN(std::string text, source.ReadFile(kGgufVocabulary));
  SLUICE_ASSIGN_OR_RETURN(const Json vocabulary,
                          checkpoint::ParseJsonObject(text, kGgufVocabulary));
  SLUICE_ASSIGN_OR_RETURN(const auto tokenizer,
                          text::Tokenizer::Load({{kGgufVocabulary, std::move(text)}}));
  SLUICE_ASSIGN_OR_RETURN((*files)["tokenizer.json"], tokenizer->ToJson());
  (*files)["tokenizer_config.json"] = TokenizerConfig(model, vocabulary).dump(2) + "\n";
  *config = GgufConfig(model);
  SetTokenIds(model, vocabulary, config);
  Json generation = Json::object();
  SetTokenIds(model, vocabulary, &generation);
  (*files)["generation_config.json"] = generation.dump(2) + "\n";
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::map<std::string, std::string>> FolderFiles(const checkpoint::Checkpoint& source,
                                                               const ConvertOptions& options) {
  std::map<std::string, std::string> files;
  Json config;
  for (const internal::v1::FileInfo& info : source.description().files()) {
    if (info.name() == kGgufVocabulary) {
      SLUICE_RETURN_IF_ERROR(AddGgufFiles(source, &config, &files));
      continue;
    }
    SLUICE_ASSIGN_OR_RETURN(files[info.name()], source.ReadFile(info.name()));
  }
  if (config.is_null()) {
    SLUICE_ASSIGN_OR_RETURN(config,
                            checkpoint::ParseJsonObject(files["config.json"], "config.json"));
  }
  const ModelConfig& model = source.description().config();
  const bool opt = model.architecture() == internal::v1::ARCHITECTURE_OPT;
  config["architectures"] = {opt ? "OPTForCausalLM" : "LlamaForCausalLM"};
  config.erase("quantization_config");
  config.erase("compression_config");
  // transformers 5 writes "dtype", 4 "torch_dtype"; both read the old name.
  config.erase("dtype");
  config["torch_dtype"] = DTypeName(options.format);
  const Json quantization = QuantizationConfig(options, model);
  if (!quantization.is_null()) config["quantization_config"] = quantization;
  files["config.json"] = config.dump(2) + "\n";
  if (options.format == Format::kGptq) {  // For readers older than the key in config.json
    files["quantize_config.json"] = quantization.dump(2) + "\n";
  }
  return files;
}

}  // namespace sluice::convert
