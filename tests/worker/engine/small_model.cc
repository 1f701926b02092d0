#include "tests/worker/engine/small_model.h"

#include <cstring>
#include <random>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace sluice::worker {
namespace {

using internal::v1::ModelConfig;
using internal::v1::ShardAssignment;

class TensorMaker {
 public:
  TensorMaker(SmallModel* model, uint32_t seed) : model_(model), random_(seed) {}

  // Uniform values around `middle`, wide enough that every tensor matters to the logits.
  void Add(const std::string& name, int64_t n, int64_t k, float middle = 0, float spread = 0.35f) {
    SmallTensor tensor{.n = n, .k = k, .values = {}};
    std::uniform_real_distribution<float> value(middle - spread, middle + spread);
    for (int64_t i = 0; i < n * k; ++i) tensor.values.push_back(value(random_));
    model_->tensors[name] = std::move(tensor);
  }
  void AddLinear(const std::string& name, int64_t n, int64_t k, bool bias) {
    Add(name + ".weight", n, k);
    if (bias) Add(name + ".bias", 1, n);
  }
  void AddNorm(const std::string& name, int64_t size, bool bias) {
    Add(name + ".weight", 1, size, 1.0f);
    if (bias) Add(name + ".bias", 1, size);
  }

 private:
  SmallModel* const model_;
  std::mt19937 random_;
};

ModelConfig BaseConfig() {
  ModelConfig config;
  config.set_num_layers(3);
  config.set_hidden_size(32);
  config.set_intermediate_size(48);
  config.set_num_heads(4);
  config.set_num_kv_heads(4);
  config.set_head_dim(8);
  config.set_vocab_size(61);
  config.set_max_position_embeddings(64);
  config.set_norm_eps(1e-5f);
  config.set_word_embed_dim(32);
  return config;
}

ModelConfig LlamaConfig() {
  ModelConfig config = BaseConfig();
  config.set_architecture(internal::v1::ARCHITECTURE_LLAMA);
  config.set_activation(internal::v1::MLP_ACTIVATION_SILU);
  config.set_num_kv_heads(2);
  config.set_head_dim(10);  // Not hidden_size / num_heads
  config.mutable_rope()->set_theta(10000);
  config.mutable_rope()->set_type("default");
  config.mutable_rope()->set_factor(1);
  return config;
}

void AddLlamaTensors(SmallModel* model, uint32_t seed) {
  const ModelConfig& config = model->config;
  TensorMaker make(model, seed);
  const int64_t hidden = config.hidden_size();
  const int64_t inner = config.intermediate_size();
  const int64_t q = config.num_heads() * config.head_dim();
  const int64_t kv = config.num_kv_heads() * config.head_dim();
  make.Add("embed_tokens.weight", config.vocab_size(), hidden);
  for (uint32_t i = 0; i < config.num_layers(); ++i) {
    const std::string layer = absl::StrCat("layers.", i, ".");
    make.AddNorm(layer + "input_layernorm", hidden, /*bias=*/false);
    make.AddLinear(layer + "self_attn.q_proj", q, hidden, config.attention_bias());
    make.AddLinear(layer + "self_attn.k_proj", kv, hidden, config.attention_bias());
    make.AddLinear(layer + "self_attn.v_proj", kv, hidden, config.attention_bias());
    make.AddLinear(layer + "self_attn.o_proj", hidden, q, config.attention_bias());
    make.AddNorm(layer + "post_attention_layernorm", hidden, /*bias=*/false);
    make.AddLinear(layer + "mlp.gate_proj", inner, hidden, config.mlp_bias());
    make.AddLinear(layer + "mlp.up_proj", inner, hidden, config.mlp_bias());
    make.AddLinear(layer + "mlp.down_proj", hidden, inner, config.mlp_bias());
  }
  make.AddNorm("norm", hidden, /*bias=*/false);
  make.Add("lm_head.weight", config.vocab_size(), hidden);
}

void AddOptTensors(SmallModel* model, uint32_t seed) {
  const ModelConfig& config = model->config;
  TensorMaker make(model, seed);
  const int64_t hidden = config.hidden_size();
  const int64_t inner = config.intermediate_size();
  const int64_t width = config.word_embed_dim();
  make.Add("embed_tokens.weight", config.vocab_size(), width);
  make.Add("embed_positions.weight", config.max_position_embeddings() + 2, hidden);
  if (width != hidden) make.AddLinear("project_in", hidden, width, /*bias=*/false);
  for (uint32_t i = 0; i < config.num_layers(); ++i) {
    const std::string layer = absl::StrCat("layers.", i, ".");
    make.AddNorm(layer + "self_attn_layer_norm", hidden, /*bias=*/true);
    for (const char* name : {"q_proj", "k_proj", "v_proj", "out_proj"}) {
      make.AddLinear(absl::StrCat(layer, "self_attn.", name), hidden, hidden, /*bias=*/true);
    }
    make.AddNorm(layer + "final_layer_norm", hidden, /*bias=*/true);
    make.AddLinear(layer + "fc1", inner, hidden, /*bias=*/true);
    make.AddLinear(layer + "fc2", hidden, inner, /*bias=*/true);
  }
  if (config.has_final_norm()) make.AddNorm("final_layer_norm", hidden, /*bias=*/true);
  if (width != hidden) make.AddLinear("project_out", width, hidden, /*bias=*/false);
}

}  // namespace

SmallModel MakeLlama(uint32_t seed) {
  SmallModel model{.config = LlamaConfig(), .tensors = {}};
  model.config.set_attention_bias(true);
  model.config.set_mlp_bias(true);
  auto* rope = model.config.mutable_rope();
  rope->set_type("llama3");
  rope->set_factor(8);
  rope->set_low_freq_factor(1);
  rope->set_high_freq_factor(4);
  rope->set_original_max_position_embeddings(32);
  AddLlamaTensors(&model, seed);
  return model;
}

SmallModel MakeTiedDynamicLlama(uint32_t seed) {
  SmallModel model{.config = LlamaConfig(), .tensors = {}};
  model.config.set_tie_word_embeddings(true);
  auto* rope = model.config.mutable_rope();
  rope->set_type("dynamic");
  rope->set_factor(2);
  rope->set_original_max_position_embeddings(8);
  AddLlamaTensors(&model, seed);
  model.tensors["lm_head.weight"] = model.tensors["embed_tokens.weight"];
  return model;
}

SmallModel MakeOpt(uint32_t seed) {
  SmallModel model{.config = BaseConfig(), .tensors = {}};
  model.config.set_architecture(internal::v1::ARCHITECTURE_OPT);
  model.config.set_activation(internal::v1::MLP_ACTIVATION_RELU);
  model.config.set_attention_bias(true);
  model.config.set_mlp_bias(true);
  model.config.set_norm_before(true);
  model.config.set_has_final_norm(true);
  model.config.set_norm_affine(true);
  model.config.set_tie_word_embeddings(true);
  AddOptTensors(&model, seed);
  model.tensors["lm_head.weight"] = model.tensors["embed_tokens.weight"];
  return model;
}

SmallModel MakeOpt350m(uint32_t seed) {
  SmallModel model = MakeOpt(seed);
  model.tensors.clear();
  model.config.set_norm_before(false);
  model.config.set_has_final_norm(false);
  model.config.set_word_embed_dim(20);
  AddOptTensors(&model, seed);
  model.tensors["lm_head.weight"] = model.tensors["embed_tokens.weight"];
  return model;
}

bool IsPartOf(const std::string& name, const ShardAssignment& assignment) {
  if (absl::StartsWith(name, "layers.")) {
    const auto number = static_cast<uint32_t>(std::stoi(name.substr(7)));
    return number >= assignment.layers().begin() && number < assignment.layers().end();
  }
  if (absl::StartsWith(name, "embed_") || absl::StartsWith(name, "project_in")) {
    return assignment.has_embedding();
  }
  return assignment.has_head();
}

std::vector<std::string> SmallModel::NamesFor(const ShardAssignment& assignment) const {
  std::vector<std::string> names;
  for (const auto& [name, tensor] : tensors) {
    if (IsPartOf(name, assignment)) names.push_back(name);
  }
  return names;
}

QuantizedMatrix ToMatrix(const SmallTensor& tensor) {
  QuantSpec spec;
  spec.plain_dtype = DType::kF32;
  spec.n = tensor.n;
  spec.k = tensor.k;
  QuantizedMatrix matrix(spec);
  std::memcpy(matrix.codes(), tensor.values.data(), tensor.values.size() * sizeof(float));
  return matrix;
}

ShardAssignment MakeAssignment(const ModelConfig& config, uint32_t stage, uint32_t stages) {
  ShardAssignment assignment;
  *assignment.mutable_config() = config;
  assignment.set_model_digest("digest");
  assignment.set_stage(stage);
  assignment.set_stages(stages);
  const uint32_t num_layers = config.num_layers();
  assignment.mutable_layers()->set_begin(num_layers * stage / stages);
  assignment.mutable_layers()->set_end(num_layers * (stage + 1) / stages);
  assignment.set_has_embedding(stage == 0);
  assignment.set_has_head(stage == stages - 1);
  assignment.set_block_size(4);
  assignment.set_num_blocks(64);
  assignment.set_max_batch_tokens(40);
  assignment.set_max_batch_size(4);
  assignment.set_max_model_len(60);
  return assignment;
}

}  // namespace sluice::worker
