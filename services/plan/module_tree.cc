#include "services/plan/module_tree.h"

#include <map>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace sluice::plan {
namespace {

using internal::v1::ARCHITECTURE_LLAMA;
using internal::v1::ARCHITECTURE_OPT;
using internal::v1::ModelConfig;
using internal::v1::PlanShardsResponse;

constexpr uint64_t kRotaryElementBytes = 4;  // inv_freq is float32 whatever the model's dtype

// Source tensors by module: "layers.0.fc1" -> {"weight", "bias"}, names without "model." and
// "decoder.".
using TensorsByModule = std::map<std::string, std::vector<TreeTensor>>;

// What a bitsandbytes file stores beside the codes; the planner does not count it (it is what the x
// 0.90 is for).
bool IsQuantState(const std::string& name) {
  for (const char* part : {".absmax", ".nested_absmax", ".quant_map", ".nested_quant_map",
                           ".quant_state.", ".SCB", ".weight_format"}) {
    if (absl::StrContains(name, part)) {
      return true;
    }
  }
  return false;
}

std::string ShortName(std::string name) {
  for (const char* prefix : {"model.", "decoder."}) {
    if (absl::StartsWith(name, prefix)) {
      name = name.substr(std::string(prefix).size());
    }
  }
  return name;
}

TensorsByModule GroupByModule(const PlanShardsResponse& model) {
  const bool bitsandbytes = model.quant().method() == "bitsandbytes";
  TensorsByModule modules;
  for (const auto& source : model.source_tensors()) {
    if (bitsandbytes && IsQuantState(source.name())) {
      continue;
    }
    const std::string name = ShortName(source.name());
    const size_t dot = name.rfind('.');
    if (dot != std::string::npos) {
      modules[name.substr(0, dot)].push_back({name.substr(dot + 1), source.bytes(), ""});
    }
  }
  return modules;
}

// A module without children; its tensors are those of the source under `short_name`.
Module Leaf(const TensorsByModule& tensors, const std::string& parent, const std::string& name,
            const std::string& class_name) {
  Module leaf{name, class_name, {}, {}, {}};
  auto it = tensors.find(JoinName(parent, name));
  if (it != tensors.end()) {
    leaf.parameters = it->second;
  }
  return leaf;
}

Module LlamaLayer(const TensorsByModule& tensors, uint32_t index) {
  const std::string layer = absl::StrCat("layers.", index);
  Module attention{"self_attn", "LlamaAttention", {}, {}, {}};
  for (const char* name : {"q_proj", "k_proj", "v_proj", "o_proj"}) {
    attention.children.push_back(Leaf(tensors, layer + ".self_attn", name, "Linear"));
  }
  Module mlp{"mlp", "LlamaMLP", {}, {}, {}};
  for (const char* name : {"gate_proj", "up_proj", "down_proj"}) {
    mlp.children.push_back(Leaf(tensors, layer + ".mlp", name, "Linear"));
  }
  Module result{absl::StrCat(index), "LlamaDecoderLayer", {}, {}, {}};
  result.children = {attention, mlp, Leaf(tensors, layer, "input_layernorm", "LlamaRMSNorm"),
                     Leaf(tensors, layer, "post_attention_layernorm", "LlamaRMSNorm")};
  return result;
}

Module OptLayer(const TensorsByModule& tensors, uint32_t index) {
  const std::string layer = absl::StrCat("layers.", index);
  Module attention{"self_attn", "OPTAttention", {}, {}, {}};
  for (const char* name : {"k_proj", "v_proj", "q_proj", "out_proj"}) {
    attention.children.push_back(Leaf(tensors, layer + ".self_attn", name, "Linear"));
  }
  Module result{absl::StrCat(index), "OPTDecoderLayer", {}, {}, {}};
  result.children = {attention, Leaf(tensors, layer, "self_attn_layer_norm", "LayerNorm"),
                     Leaf(tensors, layer, "fc1", "Linear"), Leaf(tensors, layer, "fc2", "Linear"),
                     Leaf(tensors, layer, "final_layer_norm", "LayerNorm")};
  return result;
}

Module LlamaModel(const TensorsByModule& tensors, const ModelConfig& config) {
  Module layers{"layers", "ModuleList", {}, {}, {}};
  for (uint32_t i = 0; i < config.num_layers(); ++i) {
    layers.children.push_back(LlamaLayer(tensors, i));
  }
  Module rotary{"rotary_emb", "LlamaRotaryEmbedding", {}, {}, {}};
  const uint64_t bytes = config.head_dim() / 2 * kRotaryElementBytes;
  rotary.buffers = {{"inv_freq", bytes, ""}, {"original_inv_freq", bytes, ""}};
  Module model{"model", "LlamaModel", {}, {}, {}};
  model.children = {Leaf(tensors, "", "embed_tokens", "Embedding"), std::move(layers),
                    Leaf(tensors, "", "norm", "LlamaRMSNorm"), std::move(rotary)};
  return model;
}

Module OptModel(const TensorsByModule& tensors, const ModelConfig& config) {
  Module decoder{"decoder", "OPTDecoder", {}, {}, {}};
  decoder.children = {Leaf(tensors, "", "embed_tokens", "Embedding"),
                      Leaf(tensors, "", "embed_positions", "OPTLearnedPositionalEmbedding")};
  for (const char* name : {"project_out", "project_in"}) {
    if (tensors.count(name) != 0) {
      decoder.children.push_back(Leaf(tensors, "", name, "Linear"));
    }
  }
  if (config.has_final_norm()) {
    decoder.children.push_back(Leaf(tensors, "", "final_layer_norm", "LayerNorm"));
  }
  Module layers{"layers", "ModuleList", {}, {}, {}};
  for (uint32_t i = 0; i < config.num_layers(); ++i) {
    layers.children.push_back(OptLayer(tensors, i));
  }
  decoder.children.push_back(std::move(layers));
  Module model{"model", "OPTModel", {}, {}, {}};
  model.children.push_back(std::move(decoder));
  return model;
}

}  // namespace

std::string LayerClass(const ModelConfig& config) {
  return config.architecture() == ARCHITECTURE_OPT ? "OPTDecoderLayer" : "LlamaDecoderLayer";
}

std::string LayersName(const ModelConfig& config) {
  return config.architecture() == ARCHITECTURE_OPT ? "model.decoder.layers" : "model.layers";
}

absl::StatusOr<Module> BuildModuleTree(const PlanShardsResponse& model) {
  const ModelConfig& config = model.config();
  const bool opt = config.architecture() == ARCHITECTURE_OPT;
  if (!opt && config.architecture() != ARCHITECTURE_LLAMA) {
    return absl::InvalidArgumentError(
        "config.architecture: expected Llama or OPT; no module tree is known for another one");
  }
  const TensorsByModule tensors = GroupByModule(model);
  Module root{"", opt ? "OPTForCausalLM" : "LlamaForCausalLM", {}, {}, {}};
  root.children.push_back(opt ? OptModel(tensors, config) : LlamaModel(tensors, config));
  Module head = Leaf(tensors, "", "lm_head", "Linear");
  if (config.tie_word_embeddings()) {
    const std::string embedding = opt ? "model.decoder.embed_tokens" : "model.embed_tokens";
    const Module* table = FindModule(root, embedding);
    head.parameters.clear();
    for (const TreeTensor& tensor : table->parameters) {
      head.parameters.push_back({tensor.name, tensor.bytes, embedding + "." + tensor.name});
    }
  }
  root.children.push_back(std::move(head));
  return root;
}

}  // namespace sluice::plan
