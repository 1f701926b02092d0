#include "services/checkpoint/gguf_config.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "kernels/core/check.h"
#include "kernels/core/status_macros.h"
#include "services/checkpoint/hf_config.h"
#include "services/checkpoint/json.h"

namespace sluice::checkpoint {
namespace {

using internal::v1::ModelConfig;
using internal::v1::RopeConfig;

constexpr uint64_t kMaxUint32 = 0xFFFFFFFF;
constexpr uint64_t kMaxVocab = 1 << 21;

absl::Status Unsupported(const GgufFile& gguf, const std::string& what) {
  return absl::UnimplementedError(absl::StrCat(gguf.file().name(), ": ", what,
                                               " is not supported; use a Llama model without it"));
}

// Factors that llama.cpp's converter writes as rope_freqs.weight for a Llama 3 scaling.
double Llama3Factor(const RopeConfig& rope, double frequency) {
  const double wavelength = 2 * std::numbers::pi / frequency;
  const double original = rope.original_max_position_embeddings();
  if (wavelength < original / rope.high_freq_factor()) return 1;
  if (wavelength > original / rope.low_freq_factor()) return rope.factor();
  const double smooth = (original / wavelength - rope.low_freq_factor()) /
                        (rope.high_freq_factor() - rope.low_freq_factor());
  return 1 / ((1 - smooth) / rope.factor() + smooth);
}

// The file holds the result of a Llama 3 scaling, not its parameters: find which of the published
// sets gives it.
absl::Status MatchLlama3(const GgufFile& gguf, const GgufTensor& freqs, ModelConfig* config) {
  const uint64_t half = config->head_dim() / 2;
  if (freqs.dtype.name != "F32" || freqs.shape != Shape{half}) {
    return absl::InvalidArgumentError(absl::StrCat(gguf.file().name(),
                                                   ": tensor rope_freqs.weight must be F32 [", half,
                                                   "]; convert the model again"));
  }
  std::vector<float> stored(half);
  SLUICE_RETURN_IF_ERROR(gguf.file().ReadAt(freqs.offset, freqs.bytes, stored.data()));
  RopeConfig rope = config->rope();
  rope.set_type("llama3");
  rope.set_low_freq_factor(1);
  rope.set_high_freq_factor(4);
  rope.set_original_max_position_embeddings(8192);
  for (const double factor : {8.0, 16.0, 32.0}) {
    rope.set_factor(factor);
    bool same = true;
    for (uint64_t i = 0; i < half; ++i) {
      const double frequency =
          std::pow(rope.theta(), -2.0 * static_cast<double>(i) / config->head_dim());
      const double wanted = Llama3Factor(rope, frequency);
      same &= std::abs(stored[i] - wanted) <= 1e-4 * wanted;
    }
    if (!same) continue;
    *config->mutable_rope() = rope;
    return absl::OkStatus();
  }
  return Unsupported(gguf, "rope_freqs.weight other than that of Llama 3.1, 3.2 or 3.3");
}

absl::Status SetRope(const GgufFile& gguf, ModelConfig* config) {
  RopeConfig* rope = config->mutable_rope();
  rope->set_type("default");
  rope->set_factor(1);
  rope->set_theta(10000);
  if (gguf.Has("llama.rope.freq_base")) {
    SLUICE_ASSIGN_OR_RETURN(const double theta, gguf.Double("llama.rope.freq_base", 1, 1e12));
    rope->set_theta(theta);
  }
  if (gguf.Has("llama.rope.dimension_count")) {
    SLUICE_ASSIGN_OR_RETURN(const uint64_t dims,
                            gguf.Uint("llama.rope.dimension_count", 1, kMaxUint32));
    if (dims != config->head_dim()) return Unsupported(gguf, "rotary embedding of part of a head");
  }
  std::string scaling = "none";
  if (gguf.Has("llama.rope.scaling.type")) {
    SLUICE_ASSIGN_OR_RETURN(scaling, gguf.Text("llama.rope.scaling.type"));
  }
  if (scaling == "linear") {
    SLUICE_ASSIGN_OR_RETURN(const double factor,
                            gguf.Double("llama.rope.scaling.factor", 1e-6, 1e6));
    rope->set_type("linear");
    rope->set_factor(factor);
  } else if (scaling != "none") {
    return Unsupported(gguf, absl::StrCat("rope scaling \"", scaling, "\""));
  }
  const GgufTensor* freqs = gguf.Find("rope_freqs.weight");
  return freqs == nullptr ? absl::OkStatus() : MatchLlama3(gguf, *freqs, config);
}

absl::Status SetShape(const GgufFile& gguf, ModelConfig* config) {
  const auto uint = [&gguf](const char* key) { return gguf.Uint(key, 1, kMaxUint32); };
  SLUICE_ASSIGN_OR_RETURN(const uint64_t layers, uint("llama.block_count"));
  SLUICE_ASSIGN_OR_RETURN(const uint64_t hidden, uint("llama.embedding_length"));
  SLUICE_ASSIGN_OR_RETURN(const uint64_t inner, uint("llama.feed_forward_length"));
  SLUICE_ASSIGN_OR_RETURN(const uint64_t context, uint("llama.context_length"));
  SLUICE_ASSIGN_OR_RETURN(const uint64_t heads, uint("llama.attention.head_count"));
  uint64_t kv_heads = heads;
  if (gguf.Has("llama.attention.head_count_kv")) {
    SLUICE_ASSIGN_OR_RETURN(kv_heads, uint("llama.attention.head_count_kv"));
  }
  uint64_t head_dim = hidden / heads;
  if (gguf.Has("llama.attention.key_length")) {
    SLUICE_ASSIGN_OR_RETURN(head_dim, uint("llama.attention.key_length"));
  } else if (hidden % heads != 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        gguf.file().name(), ": key llama.embedding_length ", hidden,
        " is no multiple of llama.attention.head_count ", heads, "; convert the model again"));
  }
  SLUICE_ASSIGN_OR_RETURN(const double eps,
                          gguf.Double("llama.attention.layer_norm_rms_epsilon", 0, 1));
  config->set_num_layers(layers);
  config->set_hidden_size(hidden);
  config->set_intermediate_size(inner);
  config->set_max_position_embeddings(context);
  config->set_num_heads(heads);
  config->set_num_kv_heads(kv_heads);
  config->set_head_dim(head_dim);
  config->set_word_embed_dim(hidden);
  config->set_norm_eps(static_cast<float>(eps));
  const GgufTensor* table = gguf.Find("token_embd.weight");
  if (table == nullptr || table->shape.size() != 2) {
    return absl::InvalidArgumentError(absl::StrCat(
        gguf.file().name(), ": tensor token_embd.weight is missing; convert the model again"));
  }
  config->set_vocab_size(static_cast<uint32_t>(table->shape[0]));
  return absl::OkStatus();
}

absl::Status SetSpecialTokens(const GgufFile& gguf, ModelConfig* config) {
  for (const char* name : {"eos", "eot", "eom"}) {
    const std::string key = absl::StrCat("tokenizer.ggml.", name, "_token_id");
    if (!gguf.Has(key)) continue;
    SLUICE_ASSIGN_OR_RETURN(const uint64_t id, gguf.Uint(key, 0, config->vocab_size() - 1));
    const auto& ids = config->eos_token_ids();
    if (std::find(ids.begin(), ids.end(), id) == ids.end()) config->add_eos_token_ids(id);
  }
  if (gguf.Has("tokenizer.ggml.bos_token_id")) {
    SLUICE_ASSIGN_OR_RETURN(const uint64_t id,
                            gguf.Uint("tokenizer.ggml.bos_token_id", 0, config->vocab_size() - 1));
    config->set_bos_token_id(static_cast<uint32_t>(id));
  }
  return absl::OkStatus();
}

// Copies one id or flag when the file has it.
absl::Status CopyVocabularyKeys(const GgufFile& gguf, uint32_t vocab_size, Json* out) {
  for (const char* name :
       {"bos_token_id", "eos_token_id", "unknown_token_id", "padding_token_id"}) {
    const std::string key = absl::StrCat("tokenizer.ggml.", name);
    if (!gguf.Has(key)) continue;
    SLUICE_ASSIGN_OR_RETURN(const uint64_t id, gguf.Uint(key, 0, kMaxUint32));
    if (id == kMaxUint32) continue;  // -1: there is none.
    if (id >= vocab_size) {
      return absl::InvalidArgumentError(absl::StrCat(gguf.file().name(), ": key ", key, " = ", id,
                                                     " is outside the vocabulary of ", vocab_size,
                                                     "; convert the model again"));
    }
    (*out)[name] = id;
  }
  for (const char* name : {"add_bos_token", "add_eos_token", "add_space_prefix"}) {
    const std::string key = absl::StrCat("tokenizer.ggml.", name);
    if (!gguf.Has(key)) continue;
    SLUICE_ASSIGN_OR_RETURN(const bool flag, gguf.Bool(key));
    (*out)[name] = flag;
  }
  for (const auto& [key, name] : {std::pair("tokenizer.ggml.pre", "pre"),
                                  std::pair("tokenizer.chat_template", "chat_template")}) {
    if (!gguf.Has(key)) continue;
    SLUICE_ASSIGN_OR_RETURN((*out)[name], gguf.Text(key));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<ModelConfig> ParseGgufConfig(const GgufFile& gguf) {
  SLUICE_ASSIGN_OR_RETURN(const std::string architecture, gguf.Text("general.architecture"));
  if (architecture != "llama") {
    return absl::UnimplementedError(
        absl::StrCat(gguf.file().name(), ": architecture \"", architecture.substr(0, 100),
                     "\" is not supported; use a GGUF file of architecture llama"));
  }
  for (const char* key : {"llama.expert_count", "llama.expert_used_count"}) {
    if (!gguf.Has(key)) continue;
    SLUICE_ASSIGN_OR_RETURN(const uint64_t experts, gguf.Uint(key, 0, kMaxUint32));
    if (experts > 0) return Unsupported(gguf, "a mixture of experts");
  }
  ModelConfig config;
  config.set_architecture(internal::v1::ARCHITECTURE_LLAMA);
  config.set_model_type("llama");
  config.set_activation(internal::v1::MLP_ACTIVATION_SILU);
  config.set_has_final_norm(true);
  config.set_norm_before(true);
  config.set_norm_affine(true);
  SLUICE_RETURN_IF_ERROR(SetShape(gguf, &config));
  SLUICE_RETURN_IF_ERROR(SetRope(gguf, &config));
  SLUICE_RETURN_IF_ERROR(SetSpecialTokens(gguf, &config));
  config.set_tie_word_embeddings(gguf.Find("output.weight") == nullptr);
  config.set_attention_bias(gguf.Find("blk.0.attn_q.bias") != nullptr);
  config.set_mlp_bias(gguf.Find("blk.0.ffn_gate.bias") != nullptr);
  const std::string& embedding = gguf.Find("token_embd.weight")->dtype.name;
  config.set_dtype(embedding == "BF16" ? "bfloat16" : embedding == "F32" ? "float32" : "float16");
  SLUICE_RETURN_IF_ERROR(CheckModelConfig(config, gguf.file().name()));
  return config;
}

std::string GgufName(const std::string& canonical) {
  static constexpr std::pair<const char*, const char*> kNames[] = {
      {"embed_tokens", "token_embd"},
      {"norm", "output_norm"},
      {"lm_head", "output"},
      {"input_layernorm", "attn_norm"},
      {"self_attn.q_proj", "attn_q"},
      {"self_attn.k_proj", "attn_k"},
      {"self_attn.v_proj", "attn_v"},
      {"self_attn.o_proj", "attn_output"},
      {"post_attention_layernorm", "ffn_norm"},
      {"mlp.gate_proj", "ffn_gate"},
      {"mlp.up_proj", "ffn_up"},
      {"mlp.down_proj", "ffn_down"}};
  std::string prefix, rest = canonical;
  if (rest.rfind("layers.", 0) == 0) {  // layers.<number>.<module>.<weight or bias>
    const size_t dot = rest.find('.', 7);
    prefix = absl::StrCat("blk.", rest.substr(7, dot - 7), ".");
    rest = rest.substr(dot + 1);
  }
  const size_t leaf = rest.rfind('.');
  for (const auto& [hf, gguf] : kNames) {
    if (rest.substr(0, leaf) == hf) return absl::StrCat(prefix, gguf, rest.substr(leaf));
  }
  SLUICE_CHECK(false) << canonical;
  return "";
}

absl::StatusOr<std::string> GgufVocabularyJson(const GgufFile& gguf, uint32_t vocab_size) {
  Json json = Json::object();
  SLUICE_ASSIGN_OR_RETURN(json["model"], gguf.Text("tokenizer.ggml.model"));
  SLUICE_ASSIGN_OR_RETURN(const auto* tokens, gguf.Texts("tokenizer.ggml.tokens"));
  if (tokens->empty() || tokens->size() > kMaxVocab || tokens->size() > vocab_size) {
    return absl::InvalidArgumentError(absl::StrCat(
        gguf.file().name(), ": key tokenizer.ggml.tokens holds ", tokens->size(),
        " tokens for an embedding table of ", vocab_size, " rows; convert the model again"));
  }
  const auto same_length = [&](const char* key, size_t size) {
    if (size == tokens->size()) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrCat(gguf.file().name(), ": key ", key, " holds ",
                                                   size, " values for ", tokens->size(),
                                                   " tokens; convert the model again"));
  };
  if (gguf.Has("tokenizer.ggml.scores")) {
    SLUICE_ASSIGN_OR_RETURN(const auto* scores, gguf.Floats("tokenizer.ggml.scores"));
    SLUICE_RETURN_IF_ERROR(same_length("tokenizer.ggml.scores", scores->size()));
    const auto bad = std::find_if_not(scores->begin(), scores->end(),
                                      [](float score) { return std::isfinite(score); });
    if (bad != scores->end()) {
      return absl::InvalidArgumentError(
          absl::StrCat(gguf.file().name(), ": key tokenizer.ggml.scores, element ",
                       bad - scores->begin(), ": must be finite; convert the model again"));
    }
    json["scores"] = *scores;
  }
  if (gguf.Has("tokenizer.ggml.token_type")) {
    SLUICE_ASSIGN_OR_RETURN(const auto* types, gguf.Integers("tokenizer.ggml.token_type"));
    SLUICE_RETURN_IF_ERROR(same_length("tokenizer.ggml.token_type", types->size()));
    json["token_type"] = *types;
  }
  if (gguf.Has("tokenizer.ggml.merges")) {
    SLUICE_ASSIGN_OR_RETURN(const auto* merges, gguf.Texts("tokenizer.ggml.merges"));
    json["merges"] = *merges;
  }
  SLUICE_RETURN_IF_ERROR(CopyVocabularyKeys(gguf, vocab_size, &json));
  json["tokens"] = *tokens;
  return json.dump(-1, ' ', /*ensure_ascii=*/false, Json::error_handler_t::replace);
}

}  // namespace sluice::checkpoint
