#include "services/checkpoint/layout.h"

#include "absl/strings/str_cat.h"

namespace sluice::checkpoint {
namespace {

using internal::v1::ModelConfig;

// Collects tensors in order.
class Table {
 public:
  void Vector(const std::string& name, int64_t size) {
    tensors_.push_back({name, 1, size, TensorRole::kVector});
  }
  void Norm(const std::string& name, int64_t size, bool bias) {
    Vector(name + ".weight", size);
    if (bias) Vector(name + ".bias", size);
  }
  void Embedding(const std::string& name, int64_t rows, int64_t columns) {
    tensors_.push_back({name + ".weight", rows, columns, TensorRole::kTable});
  }
  void Linear(const std::string& name, int64_t n, int64_t k, bool bias) {
    tensors_.push_back({name + ".weight", n, k, TensorRole::kLinear});
    if (bias) Vector(name + ".bias", n);
  }
  std::vector<ExpectedTensor> Take() { return std::move(tensors_); }

 private:
  std::vector<ExpectedTensor> tensors_;
};

void AddAttention(const ModelConfig& config, const std::string& prefix, const char* out_name,
                  Table* table) {
  const int64_t hidden = config.hidden_size();
  const int64_t query = int64_t{config.num_heads()} * config.head_dim();
  const int64_t key = int64_t{config.num_kv_heads()} * config.head_dim();
  const bool bias = config.attention_bias();
  table->Linear(prefix + "q_proj", query, hidden, bias);
  table->Linear(prefix + "k_proj", key, hidden, bias);
  table->Linear(prefix + "v_proj", key, hidden, bias);
  table->Linear(prefix + out_name, hidden, query, bias);
}

void AddLlamaLayer(const ModelConfig& config, const std::string& prefix, Table* table) {
  const int64_t hidden = config.hidden_size();
  const int64_t inner = config.intermediate_size();
  table->Norm(prefix + "input_layernorm", hidden, /*bias=*/false);
  AddAttention(config, prefix + "self_attn.", "o_proj", table);
  table->Norm(prefix + "post_attention_layernorm", hidden, /*bias=*/false);
  table->Linear(prefix + "mlp.gate_proj", inner, hidden, config.mlp_bias());
  table->Linear(prefix + "mlp.up_proj", inner, hidden, config.mlp_bias());
  table->Linear(prefix + "mlp.down_proj", hidden, inner, config.mlp_bias());
}

void AddOptLayer(const ModelConfig& config, const std::string& prefix, Table* table) {
  const int64_t hidden = config.hidden_size();
  const int64_t inner = config.intermediate_size();
  if (config.norm_affine()) table->Norm(prefix + "self_attn_layer_norm", hidden, /*bias=*/true);
  AddAttention(config, prefix + "self_attn.", "out_proj", table);
  if (config.norm_affine()) table->Norm(prefix + "final_layer_norm", hidden, /*bias=*/true);
  table->Linear(prefix + "fc1", inner, hidden, config.mlp_bias());
  table->Linear(prefix + "fc2", hidden, inner, config.mlp_bias());
}

}  // namespace

std::vector<ExpectedTensor> ExpectedTensors(const ModelConfig& config) {
  Table table;
  const bool opt = config.architecture() == internal::v1::ARCHITECTURE_OPT;
  const int64_t hidden = config.hidden_size();
  const int64_t embed = config.word_embed_dim();
  table.Embedding("embed_tokens", config.vocab_size(), embed);
  if (opt) {  // Row = position + 2.
    table.Embedding("embed_positions", int64_t{config.max_position_embeddings()} + 2, hidden);
    if (embed != hidden) table.Linear("project_in", hidden, embed, /*bias=*/false);
  }
  for (uint32_t layer = 0; layer < config.num_layers(); ++layer) {
    const std::string prefix = absl::StrCat("layers.", layer, ".");
    opt ? AddOptLayer(config, prefix, &table) : AddLlamaLayer(config, prefix, &table);
  }
  if (!opt) table.Norm("norm", hidden, /*bias=*/false);
  if (opt && config.has_final_norm() && config.norm_affine()) {
    table.Norm("final_layer_norm", hidden, /*bias=*/true);
  }
  if (opt && embed != hidden) table.Linear("project_out", embed, hidden, /*bias=*/false);
  if (!config.tie_word_embeddings()) {
    table.Linear("lm_head", config.vocab_size(), embed, /*bias=*/false);
  }
  return table.Take();
}

std::string HfName(const ModelConfig& config, const std::string& canonical) {
  if (canonical.rfind("lm_head.", 0) == 0) return canonical;
  const bool opt = config.architecture() == internal::v1::ARCHITECTURE_OPT;
  return (opt ? "model.decoder." : "model.") + canonical;
}

internal::v1::TensorSpec ToProto(const std::string& name, const QuantSpec& spec) {
  internal::v1::TensorSpec proto;
  proto.set_name(name);
  proto.set_format(static_cast<uint32_t>(spec.format));
  if (spec.format == QuantFormat::kPlain) {
    proto.set_plain_dtype(static_cast<uint32_t>(spec.plain_dtype));
  } else {
    proto.set_scale_dtype(static_cast<uint32_t>(spec.scale_dtype));
    proto.set_group_size(static_cast<uint64_t>(spec.group_size));
  }
  proto.set_n(static_cast<uint64_t>(spec.n));
  proto.set_k(static_cast<uint64_t>(spec.k));
  proto.set_has_perm(spec.has_perm);
  proto.set_bytes(SizesOf(spec).total());
  return proto;
}

}  // namespace sluice::checkpoint
